"""Placements as they are -> how a call is cut: one axis for each dimension of the device mesh, or none.

    q Shard(1), k Shard(1), v Replicate     ->   ("h",): every rank computes its heads; v is sliced
    q Shard(2), k Shard(2), v Shard(2)      ->   ("i",): every rank computes its rows; k and v are gathered

Each layout offered is exact, so the choice is one of cost: the bytes that have to move.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

WHOLE = ""
"""The mesh dimension does not cut the call: its ranks all compute the same."""
Layout = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of a call, and along which of its dimensions each axis cuts it; an axis it lacks leaves it whole."""

    tensor: DTensor
    dims: Mapping[str, int]

    def wanted(self, layout: Layout) -> tuple[Placement, ...]:
        """Where it has to lie."""
        return tuple(Shard(self.dims[axis]) if axis in self.dims else Replicate() for axis in layout)

    def cost(self, layout: Layout) -> float:
        """Bytes a rank receives, about."""
        mesh, size = self.tensor.device_mesh, self.tensor.element_size() * math.prod(map(hint, self.tensor.shape))
        total = 0.0
        for dim, (have, want) in enumerate(zip(self.tensor.placements, self.wanted(layout), strict=True)):
            ranks = mesh.size(dim)
            if have == want or have.is_replicate():
                continue
            moved = size * (ranks - 1) / ranks
            if have.is_partial():
                total += moved if want.is_shard() else 2 * moved
            else:
                total += moved / ranks if want.is_shard() else moved
        return total


def result_placements(dims: Mapping[str, int], layout: Layout) -> tuple[Placement, ...]:
    """Where a result lies: along an axis it lacks, every rank has a part of the sum."""
    return tuple(Shard(dims[axis]) if axis in dims else Partial() if axis != WHOLE else Replicate() for axis in layout)


def choose(operands: Sequence[Operand], axes: Sequence[str], exact: Callable[[Mapping[str, int]], bool]) -> Layout:
    """The cheapest layout that is exact; of equal ones that which leaves most where it is.

    exact: whether axes may be cut into so many parts.  A call that is not cut always is."""
    mesh = operands[0].tensor.device_mesh
    layouts = itertools.product((WHOLE, *axes), repeat=mesh.ndim)
    allowed = [x for x in layouts if exact(parts(x, [mesh.size(dim) for dim in range(mesh.ndim)]))]

    def effort(layout: Layout) -> tuple[float, int]:
        moves = sum(x.tensor.placements != x.wanted(layout) for x in operands)
        return sum(x.cost(layout) for x in operands), moves

    return min(allowed, key=effort)


def parts(layout: Layout, mesh_shape: Sequence[int]) -> dict[str, int]:
    """Axis -> into how many parts it is cut."""
    cut: dict[str, int] = {}
    for axis, ranks in zip(layout, mesh_shape, strict=True):
        if axis != WHOLE:
            cut[axis] = cut.get(axis, 1) * ranks
    return cut


def first_of(axis: str, size: int, layout: Layout, mesh_shape: Sequence[int], coordinate: Sequence[int]) -> int:
    """Where the shard of a rank begins.  Cut as `Shard` cuts: by mesh dimensions in order, into chunks of equal size
    but for the last ones."""
    start = 0
    for name, ranks, place in zip(layout, mesh_shape, coordinate, strict=True):
        if name != axis:
            continue
        if size % ranks == 0:
            size //= ranks
            start += size * place
        else:
            chunk = (size + ranks - 1) // ranks
            begin = torch.sym_min(chunk * place, size)
            start += begin
            size = torch.sym_min(chunk, size - begin)
    return start


def hint(size: int) -> int:
    """A size as far as cost is concerned: no guard is added to a symbolic one."""
    if isinstance(size, int):
        return size
    known = getattr(size.node, "hint", None)
    return int(known) if known is not None else 4096
