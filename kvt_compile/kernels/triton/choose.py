"""A launch -> its block sizes: the one place where a measured choice comes in (`kernels/tune`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from kvt_compile.kernels import tune
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton import apart
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import candidates, default, has_warpgroups, may_run
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.jobs import Job
from kvt_compile.kernels.triton.layout import listing
from kvt_compile.kernels.triton.targets import precision
from kvt_compile.kernels.tune.race import Effort, Outcome, Tell
from kvt_compile.kernels.tune.timing import DeviceClock
from kvt_compile.kernels.warn import warn_once


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its size, and how to try it."""

    spec: KernelSpec | SoftmaxSpec
    part: str
    queries: int
    keys: int
    heads: int
    """B * Hq."""
    topk: int
    device: torch.device
    run: Callable[[Blocks], Callable[[], None]]
    """Block sizes -> a function that launches with them, on the caller's data and to no effect that lasts."""
    job: Callable[[], Job] | None = None
    """What another process needs to try it."""

    @property
    def first(self) -> Blocks:
        """What is used where nothing is known."""
        return default(self.spec, self.part, self.queries, self.keys, warpgroups=has_warpgroups(self.device))


def choose(launch: Launch, mode: tune.Mode | None = None) -> Blocks:
    """Block sizes for one launch.  mode: instead of the one that was asked for when the site was compiled."""
    mode = mode or tune.requested(launch.spec)
    # the row kernels have one candidate; lists of tiles, which say how long a kernel runs, are none that a worker draws
    if mode == "off" or isinstance(launch.spec, SoftmaxSpec) or listing(launch.spec) is not None:
        return launch.first
    shape = tune.ShapeClass.of(launch.queries, launch.keys, launch.heads, launch.topk)
    key = _key(launch.spec, launch.part, shape, launch.device, precision(launch.spec))
    found = tune.pick(
        key,
        lambda: candidates(
            launch.spec, launch.part, launch.queries, launch.keys, warpgroups=has_warpgroups(launch.device)
        ),
        launch.first,
        launch.run,
        mode,
        lambda: DeviceClock(launch.device),
        partial(_apart, launch.job) if launch.job is not None and launch.device.type == "cuda" else None,
    )
    if may_run(found, launch.spec, launch.part, launch.queries, launch.keys):
        return found
    warn_once(
        f"the tuning result for {key.part} {key.shape} on {key.device} is none that could have been measured "
        f"({found}); the default runs. kvt cache list shows it, kvt cache clear --tuning removes it"
    )
    return launch.first


def _apart(
    job: Callable[[], Job], contestants: Sequence[Blocks], effort: Effort, tell: Tell[Blocks]
) -> Outcome[Blocks]:
    return apart.measure(job(), contestants, effort, tell)


@lru_cache(maxsize=4096)
def _key(spec: KernelSpec, part: str, shape: tune.ShapeClass, device: torch.device, products: str) -> tune.Key:
    import triton

    return tune.Key.on(
        device,
        kernel=tune.digest(module_source(spec), products),
        part=part,
        triton=triton.__version__,
        shape=shape,
        description=f"{spec.dtype}, D = {spec.head_dim}, Dv = {spec.value_dim}, t = {spec.score}, w = {spec.weight}",
    )
