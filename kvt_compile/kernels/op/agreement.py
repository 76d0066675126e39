"""Which lowering this process computes a kernel by -> a warning where another rank computes the same one by another.

    rank 0: c    rank 1 (no compiler there): aten    ->   told on whichever of them comes second

Data and tensor parallelism would not show it: each rank has a result that is right to rounding, keys at the threshold
may differ, and the slow rank holds the others up.  One entry of the process group's store for each kernel, and no
collective: ranks may come at any time, or never.
"""

from __future__ import annotations

import hashlib
import logging

import torch

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.warn import warn_once

log = logging.getLogger(__name__)


def note(spec: KernelSpec | SoftmaxSpec, device: str, chosen: str) -> None:
    """Writes down what this rank chose by itself for a kernel, and warns where the first that did chose otherwise."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    rank = distributed.get_rank()
    key = f"kvt:lowering:{device}:{hashlib.sha256(repr(spec).encode()).hexdigest()[:32]}"
    try:
        group: torch.distributed.ProcessGroup = distributed.group.WORLD  # type: ignore[assignment]
        first = group.get_group_store().compare_set(key, "", f"{rank} {chosen}").decode()
        other, _, theirs = first.partition(" ")
    except Exception as error:  # a store of another kind, or one whose process has left: nothing depends on it
        log.debug("the lowerings of ranks cannot be compared: %s", error)
        return
    if theirs != chosen and other != str(rank):  # what a rank chooses itself may change with its settings
        warn_once(
            f"rank {rank} computes k-NN attention on its {device} by the lowering {chosen!r} and rank {other} by "
            f"{theirs!r}. Results agree to rounding, but a key whose score is all but the threshold may be kept on one "
            "rank alone, and the slower rank holds up the others. `kvt doctor` says on each machine what it lacks (a "
            "compiler, Triton)",
            about=("ranks disagree", device),
        )
