"""Races in order of importance, until the time is spent -> speed.json after every one of them.

Contestants take turns; each turn is timed with CUDA events after the second-level cache was overwritten.  Peak memory
is what one run allocates beyond its inputs.  Races that an earlier run of the same code has finished are not run again.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu.cells import COMPILED, FLEX, OURS, TOLERANT, Race, races
from benchmarks.gpu.contestants import Contestants
from benchmarks.gpu.place import Place, place
from benchmarks.gpu.plan import Budget, Measured, measure, reason_of
from benchmarks.gpu.step import Context
from benchmarks.gpu.tuning import import_results
from kvt_compile.kernels.tune.timing import Run

NOT_TIMED = "launched on the stub, not timed"
DRY_RACES = 14
"""Of a dry run: the bars' cells and the windows, the rest only for a cache to carry."""


def run(context: Context) -> None:
    import_results(context)
    plan = races()
    found: dict[str, Any] = context.load("speed.json").get("races", {})
    budget = Budget(context.left() - 3.0, time.perf_counter)
    with place(context.dry) as here:
        for number, race in enumerate(plan):
            if finished(found.get(str(race))):
                continue
            if context.dry and number >= DRY_RACES and not context.everything:
                continue
            if budget.left() <= 0:
                break
            found[str(race)] = run_race(race, here, budget).to_dict()
            context.save("speed.json", races=found)
            context.log(line(found[str(race)]))
            context.say(f"{len(found)} of {len(plan)} races " + ("launched" if context.dry else "run"))
            context.survive()
    failed = [name for name, record in found.items() if failures(record)]
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


def failures(record: dict[str, Any]) -> list[str]:
    """Why ours, or all of a race, has no number where it should have one."""
    reasons = [record["dropped"].get(who) for who in (OURS, TOLERANT, "inputs")]
    return [reason for reason in reasons if reason and reason != NOT_TIMED and not reason.startswith("not run")]


def finished(record: dict[str, Any] | None) -> bool:
    """Whether a race need not be run again: nobody was left out for want of time."""
    return record is not None and not any(reason.startswith("not run") for reason in record["dropped"].values())


def run_race(race: Race, here: Place, budget: Budget) -> Measured:
    """One race; its tensors are gone afterwards."""
    try:
        torch.compiler.reset()
        contestants = Contestants(race.cell, here.device, here.clock, real=here.real)
        prepare = {name: build for name, build in contestants.prepare().items() if name in race.contestants}
        if not here.real:
            for name in (FLEX, COMPILED):
                prepare.pop(name, None)
        result = measure(
            race.cell, prepare, here.clock, budget, lambda run: peak_mb(run, here), seconds=0.6 if here.real else 0.0
        )
        result.notes = {
            "lowering": contestants.lowering_name(),
            "errors": contestants.errors,
            "sdpa": contestants.backend,
        }
    except Exception as error:  # no room for the inputs, say
        return Measured(race.cell, dropped={"inputs": reason_of(error)})
    finally:
        if here.real:
            with suppress(RuntimeError):  # a broken context, which `Context.survive` sees to
                torch.cuda.empty_cache()
    if not here.real:
        result.dropped |= dict.fromkeys(result.ms, NOT_TIMED)
        result.ms, result.peak_mb, result.notes["launches"] = {}, {}, here.launches
    return result


def peak_mb(run: Run, here: Place) -> float:
    """Megabytes that one run allocates at most beyond what is there; 0 on the stub."""
    if not here.real:
        return 0.0
    torch.cuda.synchronize(here.device)
    torch.cuda.reset_peak_memory_stats(here.device)
    before = torch.cuda.memory_allocated(here.device)
    run()
    torch.cuda.synchronize(here.device)
    return (torch.cuda.max_memory_allocated(here.device) - before) / 1e6


def line(record: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {ms:.4f} ms" for name, ms in record["ms"].items()) or "nothing timed"
    dropped = "; ".join(f"{name}: {why}" for name, why in record["dropped"].items() if why != NOT_TIMED)
    return f"{record['cell']}: {times}" + (f" ({dropped})" if dropped else "")
