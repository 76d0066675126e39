"""A process of its own for a tuner: Job + candidates -> compiled kernels in Triton's cache, or times.

    python -m kvt_compile.kernels.triton.worker        stdin: a pickled Task        stdout: one JSON list a line

    "compile"   needs no GPU: Triton is told the target.  Says nothing; what fails to compile fails again where it runs
    "measure"   ["trying", n]    ["dropped", n, reason]    ["times", [[n, milliseconds], ...]]

A kernel that faults takes its CUDA context with it, for good.  It then ends this process, and the one that asked knows
by the last ["trying", n] which candidate it was.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch

from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.constants import constexprs, options
from kvt_compile.kernels.triton.jobs import Described, Job, Task
from kvt_compile.kernels.triton.module import module
from kvt_compile.kernels.tune import Unfit
from kvt_compile.kernels.tune.race import race, reason_of
from kvt_compile.kernels.tune.timing import Clock, DeviceClock, WallClock


def main() -> None:
    task: Task = pickle.load(sys.stdin.buffer)  # of the process that started this one
    answers, sys.stdout = sys.stdout, io.StringIO()  # whatever else is written does not answer
    where, _, name = task.within.partition(":")
    with getattr(import_module(where), name)() if where else nullcontext():
        if task.kind == "compile":
            compile_all(task.job, task.candidates)
        else:

            def say(*answer: Any) -> None:
                answers.write(json.dumps(answer) + "\n")
                answers.flush()

            measure(task, say)


def compile_all(job: Job, candidates: Sequence[Blocks]) -> None:
    """Compile for the job's target, into Triton's cache."""
    import triton

    kernel = getattr(module(job.spec), job.part)
    arguments = [_Pointer(x) if isinstance(x, Described) else x for x in job.arguments]
    triton.runtime.driver.set_active(_Target(job.target))
    for blocks in candidates:
        try:
            kernel.warmup(*arguments, grid=(1,), **_constants(job, blocks), **options(blocks))
        except Exception:
            continue


def measure(task: Task, say: Callable[..., None]) -> None:
    """Run every candidate once, then all that can be run against each other."""
    job = task.job
    device = torch.device(job.device)
    kernel = getattr(module(job.spec), job.part)
    clock: Clock = DeviceClock(device) if device.type == "cuda" else WallClock()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        arguments = [x.like(device) if isinstance(x, Described) else x for x in job.arguments]

        def runner(blocks: Blocks) -> Callable[[], Any]:
            grid, constants = (job.sizes.programs(job.part, blocks),), _constants(job, blocks)
            return lambda: kernel[grid](*arguments, **constants, **options(blocks))

        ready: list[int] = []
        for number, blocks in enumerate(task.candidates):
            say("trying", number)
            try:
                _first_run(runner(blocks), clock)
                ready.append(number)
            except Exception as error:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # raises, and ends the process, where the context is lost
                say("dropped", number, reason_of(error))
        times = race([runner(task.candidates[n]) for n in ready], clock, task.effort) if ready else []
        say("times", list(zip(ready, times, strict=True)))


def _first_run(run: Callable[[], Any], clock: Clock) -> None:
    """Raises Unfit for a kernel that spills, and what a launch raises."""
    compiled: list[Any] = []
    clock.milliseconds(lambda: compiled.append(run()))
    if compiled[0] is not None and compiled[0].n_spills:
        raise Unfit(f"spills {compiled[0].n_spills} registers")


def _constants(job: Job, blocks: Blocks) -> dict[str, Any]:
    return constexprs(job.part, blocks, job.index, job.products)


class _Pointer:
    """What Triton looks at of a tensor when it compiles for it."""

    def __init__(self, described: Described) -> None:
        self.dtype = described.dtype
        self._address = 16 if described.aligned else 1

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


class _Target:
    """What Triton asks a driver for when it compiles and does not launch."""

    def __init__(self, target: tuple[str, Any, int]) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self._target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


if __name__ == "__main__":
    main()
