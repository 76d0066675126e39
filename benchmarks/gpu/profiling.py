"""The two cells that are slowest against their bars -> profile.json: time of each kernel, of forwards without one of
their parts, and, where Nsight Compute is there, its counters of each kernel.

    python -m benchmarks.gpu.profiling DTYPE DIM SIZE TOPK BACKWARD      what ncu runs: our kernels of one cell, once
"""

from __future__ import annotations

import csv
import io
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ablate import CUTS, Ablated
from benchmarks.gpu.cells import Cell, races
from benchmarks.gpu.contestants import Contestants
from benchmarks.gpu.place import Place, place
from benchmarks.gpu.plan import reason_of
from benchmarks.gpu.step import Context
from benchmarks.gpu.tuning import import_results
from kvt_compile.kernels import lowerings
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.lowering import TritonLowering

ROOT = Path(__file__).resolve().parents[2]
WORST = 2
TURNS = 15
NCU_S = 60.0
"""Longest for one cell."""


def run(context: Context) -> None:
    import_results(context)
    cells = slowest(context.load("speed.json").get("races", {}))
    found: dict[str, Any] = context.load("profile.json").get("cells", {})
    with place(context.dry) as here:
        for cell in cells:
            record = found.setdefault(str(cell), {})
            for name, take in (("kernels", kernel_times), ("without", times_without)):
                if name not in record:
                    record[name] = take(cell, here)
                    context.save("profile.json", cells=found)
                    context.log(f"{cell}: {name} {record[name]}")
                    context.survive()
    for cell in cells:
        if "counters" not in found[str(cell)]:
            found[str(cell)]["counters"] = counters(cell, min(NCU_S, context.left() - 2.0), context.dry)
            context.save("profile.json", cells=found)
    context.say(f"{', '.join(map(str, cells))} taken apart")
    failed = [f"{name}: {x}" for name, record in found.items() for x in failures(record)]
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


def failures(record: dict[str, Any]) -> list[str]:
    """Of the launches; what Nsight Compute cannot do is no failure."""
    return [str(x) for key in ("kernels", "without") for x in record.get(key, {}).values() if isinstance(x, str)]


def slowest(races_done: dict[str, Any]) -> list[Cell]:
    """By how far their time is from its bar; the bars' first cells where nothing was timed."""
    by_name = {str(race.cell): race.cell for race in races()}
    far: dict[str, float] = {}
    for record in races_done.values():
        for bar in record["bars"]:
            if bar["bar"].endswith("against SDPA") and not bar["bar"].startswith("peak"):
                far[record["cell"]] = bar["ratio"] / bar["must"]
    order = sorted(far, key=far.__getitem__, reverse=True) or list(by_name)
    return [by_name[name] for name in order[:WORST]]


class Timed(Launcher):
    """Notes what every launch took."""

    def __init__(self, here: Place) -> None:
        super().__init__()
        self.here = here
        self.events: list[tuple[str, Any, Any]] = []

    def launch(self, kernel: Any, programs: int, arguments: Any, constants: Any, blocks: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) if self.here.real else None for _ in range(2))
        if start is not None:
            start.record()
        made = super().launch(kernel, programs, arguments, constants, blocks)
        if end is not None:
            end.record()
        self.events.append((kernel.fn.__name__, start, end))
        return made


def kernel_times(cell: Cell, here: Place) -> dict[str, Any]:
    """Kernel -> median milliseconds of its launch (with the host's part, where that is longer); None on the stub."""
    launcher = Timed(here)
    undo = lowerings.register("timed", TritonLowering(launcher, devices=(here.device.type,)))
    try:
        contestants = Contestants(cell, here.device, here.clock, "timed", real=here.real)
        ours = contestants.timed_ours(0.0)
        ours()
        launcher.events.clear()
        for _ in range(TURNS if here.real else 1):
            here.clock.milliseconds(ours)
        if here.real:
            torch.cuda.synchronize(here.device)
        times: dict[str, list[float]] = {}
        for name, start, end in launcher.events:
            times.setdefault(name, []).append(start.elapsed_time(end) if here.real else float("nan"))
        return {name: round(statistics.median(x), 5) if here.real else None for name, x in times.items()}
    except Exception as error:
        return {"failed": reason_of(error)}
    finally:
        undo()


def times_without(cell: Cell, here: Place) -> dict[str, Any]:
    """Part -> median milliseconds of the forward without it ("nothing": of the whole), or why there is none."""
    found: dict[str, Any] = {}
    forward = Cell(cell.dtype, cell.dim, cell.size, cell.topk, backward=False)
    for part in ("nothing", *CUTS):
        launcher = Launcher() if part == "nothing" else Ablated(part)
        undo = lowerings.register("ablated", TritonLowering(launcher, devices=(here.device.type,)))
        try:
            ours = Contestants(forward, here.device, here.clock, "ablated", real=here.real).timed_ours(0.0)
            ours()
            turns = [here.clock.milliseconds(ours) for _ in range(TURNS if here.real else 1)]
            found[part] = round(statistics.median(turns), 5) if here.real else None
        except Exception as error:
            found[part] = reason_of(error)
        finally:
            undo()
    return found


def counters(cell: Cell, seconds: float, dry: bool) -> dict[str, Any]:
    """Kernel -> metric -> value, by Nsight Compute; or why there are none."""
    tool = shutil.which("ncu")
    if tool is None or dry:
        return {"left out": "dry run" if dry else "ncu is not on the PATH"}
    command = [
        tool,
        "--clock-control",
        "none",
        "--set",
        "detailed",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "raw",
    ]
    command += [
        sys.executable,
        "-m",
        "benchmarks.gpu.profiling",
        cell.dtype,
        *map(str, (cell.dim, cell.size, cell.topk)),
    ]
    try:
        done = subprocess.run(
            [*command, str(int(cell.backward))], cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired:
        return {"left out": f"ncu took longer than {seconds:.0f} s"}
    found = read_counters(done.stdout)
    if not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"left out": f"ncu ended with {done.returncode}: {said[-1][:300] if said else 'no output'}"}
    return found


def read_counters(text: str) -> dict[str, Any]:
    """ncu's raw page as CSV (a row of names, a row of units, a row for each kernel) -> kernel -> "metric [unit]" ->
    value."""
    rows = list(csv.reader(io.StringIO("\n".join(x for x in text.splitlines() if x.startswith('"')))))
    if len(rows) < 3:
        return {}
    names, units, *kernels = rows
    place_of = names.index("Kernel Name")
    found: dict[str, Any] = {}
    for row in kernels:
        facts = {
            f"{name} [{unit}]" if unit else name: value
            for name, unit, value in zip(names, units, row, strict=False)
            if "__" in name or name.startswith("launch")
        }
        found.setdefault(row[place_of], facts)
    return found


def once(cell: Cell) -> None:
    """Our kernels of a cell: once to compile, then once between the marks that ncu looks at."""
    with place(False) as here:
        ours = Contestants(cell, here.device, here.clock).timed_ours(0.0)
        ours()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        ours()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    kind, *numbers, is_backward = sys.argv[1:]
    once(Cell(kind, *map(int, numbers), backward=is_backward == "1"))
