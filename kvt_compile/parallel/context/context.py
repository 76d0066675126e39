"""`with context_parallel(mesh, "cp"):` -> attention inside is over the sequence that ranks of the mesh share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from kvt_compile.kernels.op import lowerings
from kvt_compile.parallel.context.lowering import ContextLowering, Way
from kvt_compile.parallel.context.order import Order, split
from kvt_compile.parallel.context.ring import Ring

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class Context:
    """What `context_parallel` gives: how sequences are cut, to cut inputs and positions the same way."""

    ring: Ring
    name: str
    """The `lowering` that attention inside asks for."""

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence -> this rank's tokens, a copy.  Raises ValueError where it cannot be cut evenly."""
        return split(x, dim, self.ring.order, self.ring.ranks)[self.ring.group.rank()].contiguous()

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens -> the whole sequence, on every rank; not differentiable."""
        return self.ring.gather(x.detach(), dim)

    def positions(self, count: int) -> Tensor:
        """int64 `[count]`: where this rank's `count` tokens are in the sequence."""
        return torch.cat([torch.arange(part.first, part.first + part.count) for part in self.ring.parts(count)])


_made: dict[str, Context] = {}


@contextmanager
def context_parallel(
    mesh: DeviceMesh, dim: str | int = 0, *, order: Order = "contiguous", way: Way = "auto"
) -> Iterator[Context]:
    """Context parallelism: while this is open, every k-NN attention takes its q, k and v for this rank's part of a
    sequence that all ranks of a mesh dimension share, and gives this rank's rows of attention over the whole of it.

    Outputs, kept keys (ties at the threshold included), dropout for a given seed and gradients are those of one
    process.  `topk` counts keys of the whole sequence, and coordinates (`is_causal`) are those of the whole sequence.
    A model is compiled inside, and its backward may run anywhere, but for what activation checkpointing recomputes:
    that is attention again, and an error outside.  Over a group of one rank it changes nothing.

    Args:
        mesh: the device mesh.
        dim: the mesh dimension along whose ranks the sequence is cut, by name or number.
        order: which tokens a rank has: "contiguous", one run; "balanced", two runs from both ends, which makes causal
            attention the same work on every rank.  `Context.shard` cuts inputs, labels and positional tables this way.
        way: "gather" sends keys and values to every rank; "count" sends queries and leaves keys where they are; "auto"
            takes the one that moves fewer bytes.

    All ranks have parts of one size.  Raises ContextParallelError (when attention runs) where they have not, where they
    would compute by different lowerings, where keys are not a part but the same on every rank (cross-attention to a
    text), and for a captured tensor that cannot be told; RefusalError (when a model is compiled) where attention would
    be left as it is, over this rank's own keys; ValueError for arguments that are none.
    """
    for name, value, allowed in (("order", order, get_args(Order)), ("way", way, get_args(Way))):
        if value not in allowed:
            raise ValueError(f"context_parallel: {name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    group = mesh.get_group(dim)
    name = f"context:{group.group_name}:{order}:{way}"
    context = _made.get(name)
    if context is None or context.ring.group is not group:
        context = _made[name] = Context(Ring(group, order), name)
        lowerings.register(name, ContextLowering(name, context.ring, way))
    if context.ring.ranks == 1:
        yield context
        return
    lowerings.enter(lowerings.Inside(name, context.ring.ranks))
    try:
        yield context
    finally:
        lowerings.leave()
