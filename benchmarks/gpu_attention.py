"""k-NN attention on a GPU against dense SDPA, FlexAttention, eager KVT and its torch.compile, and ViT-B/16 as a whole.

    python benchmarks/gpu_attention.py [--seconds 460] [--json PATH] [--dtypes ...] [--dims ...] [--sizes ...]

One run of less than eight minutes: the cells in order of importance, until the time is spent; what was left out is
listed with the reason.  Contestants take turns; each turn is timed with CUDA events after the second-level cache was
overwritten.
Peak memory is what one run allocates beyond its inputs.  Ends with status 2 on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _gpu_contestants import Contestants
from _gpu_plan import COMPILED, FLEX, SIZES, Budget, Cell, Measured, cells, measure, reason_of
from _gpu_table import missing, model_lines, table, write
from _vit import VisionTransformer
from rich.console import Console

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.tune.timing import Clock, DeviceClock, Run, medians

MODEL_SECONDS = 120.0
"""The model is left out when less than this remains: four compilations."""


def main() -> None:
    arguments = _arguments()
    if not torch.cuda.is_available():
        sys.exit(_no_gpu())
    warnings.filterwarnings("ignore", category=UserWarning)
    device = torch.device("cuda", torch.cuda.current_device())
    budget = Budget(arguments.seconds, time.perf_counter)
    console = Console(width=200, highlight=False)
    results: list[Measured] = []
    models: list[dict[str, Any]] = []
    about = about_machine(device) | {"lowering": arguments.lowering, "autotune": arguments.autotune}
    plan = cells(arguments.dtypes, arguments.dims, arguments.sizes)
    first = [cell for cell in plan if (cell.dtype, cell.dim, cell.topk) == _first(plan, cell)]
    clock = DeviceClock(device, lead_ms=1.0)
    for cell in first:
        results.append(run_cell(cell, device, clock, budget, arguments))
        console.print(_line(results[-1]), style="dim")
        _save(arguments.json, about, results, models, budget)
    for line in () if arguments.no_model else run_models(device, clock, budget, arguments):
        models.append(line)
        console.print(*model_lines([line]), style="dim")
        _save(arguments.json, about, results, models, budget)
    for cell in plan:
        if cell not in first:
            results.append(run_cell(cell, device, clock, budget, arguments))
            console.print(_line(results[-1]), style="dim")
            _save(arguments.json, about, results, models, budget)
    console.print(table(results, f"{about['gpu']}, torch {about['torch']}, {about['date']}, {budget.spent():.0f} s"))
    for line in (*model_lines(models), *missing(results)):
        console.print(line)


def run_cell(cell: Cell, device: torch.device, clock: Clock, budget: Budget, arguments: argparse.Namespace) -> Measured:
    """One cell; its tensors are gone afterwards."""
    try:
        torch.compiler.reset()
        contestants = Contestants(cell, device, clock, arguments.lowering, arguments.autotune)
        prepare = contestants.prepare()
        for name in () if arguments.compiling else (COMPILED, FLEX):
            del prepare[name]
        result = measure(cell, prepare, clock, budget, lambda run: peak_mb(run, device))
        contestants.judge(result)
        return result
    except torch.OutOfMemoryError as error:  # the inputs themselves
        return Measured(cell, dropped={"inputs": reason_of(error)})
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def peak_mb(run: Run, device: torch.device) -> float:
    """Megabytes that one run allocates at most beyond what is there."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def run_models(
    device: torch.device, clock: Clock, budget: Budget, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """ViT-B/16, bfloat16 autocast: inference, then a training step, each against dense torch.compile."""
    for train in (False, True):
        what = f"ViT-B/16 @224 AMP batch {arguments.batch} {'training step' if train else 'inference'}"
        if budget.left() < MODEL_SECONDS / 2:
            yield {"what": what, "dropped": f"not run: {budget.left():.0f} s were left"}
            continue
        try:
            torch.compiler.reset()
            options = {"topk": 0.5, "lowering": arguments.lowering, "autotune": arguments.autotune}
            runs = [
                model_run(device, arguments.batch, train, torch.compile(net, backend=backend, options=chosen), net)
                for net, backend, chosen in (
                    (VisionTransformer(), "kvt", options),
                    (VisionTransformer(), "inductor", None),
                )
            ]
            ours, dense = medians(runs, clock, seconds=5.0)
            yield {"what": what, "ours_ms": ours, "dense_ms": dense}
        except Exception as error:
            yield {"what": what, "dropped": reason_of(error)}


def model_run(device: torch.device, batch: int, train: bool, compiled: Any, net: torch.nn.Module) -> Run:
    """One inference, or forward, loss, backward and an AdamW step."""
    net.to(device).train(train)
    side = 224
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True) if train else None

    def infer() -> object:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return compiled(images)

    def step() -> None:
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()

    return step if train else infer


def about_machine(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "triton": triton_version,
        "date": str(date.today()),
    }


def _first(plan: list[Cell], cell: Cell) -> tuple[str, int, int]:
    """The dtype, D and k that are measured before the model: those the table begins with."""
    part = plan[0].size / plan[0].topk
    return plan[0].dtype, plan[0].dim, -(-cell.size // round(part))


def _line(result: Measured) -> str:
    ratios = " ".join(f"{name} {x:.2f}" for name, x in result.ratios().items())
    return f"{result.cell}: {ratios or 'nothing measured'}"


def _save(
    path: Path | None, about: dict[str, Any], results: list[Measured], models: list[dict[str, Any]], budget: Budget
) -> None:
    if path is not None:
        write(path, about | {"seconds": round(budget.spent(), 1)}, results, models)


def _no_gpu() -> int:
    sys.stderr.write(f"gpu_attention: torch {torch.__version__} finds no GPU here; run it on a machine that has one\n")
    return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=460.0, help="time for the whole run")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--dims", nargs="+", type=int, choices=[64, 128], default=[64, 128])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--lowering", choices=lowerings.names(), default="auto")
    parser.add_argument("--autotune", choices=["off", "cached", "on"], default="cached", help="block sizes of ours")
    parser.add_argument("--batch", type=int, default=128, help="of the model")
    parser.add_argument("--no-model", action="store_true", help="attention only")
    parser.add_argument("--no-compiling", dest="compiling", action="store_false", help="no torch.compile, no Flex")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
