"""A selection and places of queries and keys -> whether the key may be kept: the definition of every selector.

window   same residue mod dilation, and |key - centre| within the window, where the centre is the query's own place
         (of its stride) moved inward until the window fits; per axis, all axes must agree
halo     block * floor(query / block) - halo <= key < block * (floor(query / block) + 1) + halo, per axis
regions  the key's region is among those chosen for the query's region (`content.py`)
keys     the key is among those chosen for the head                     heads    the head is among those of the query
shifted  floor(query / G) = floor(key / G), or of (place + floor(G / 2)) in the second half of the heads
sinks    key < n                    prefix   key < n or query < n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import (
    Both,
    Either,
    Halo,
    Heads,
    Keys,
    Prefix,
    Regions,
    SelectionError,
    Selector,
    Shifted,
    Sinks,
    Window,
    per_axis,
)

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Places:
    """Batch, query head, query and key of every element: int64 tensors that broadcast together."""

    geometry: Geometry
    heads: int
    """How many query heads there are."""
    b: Tensor
    h: Tensor
    i: Tensor
    j: Tensor
    tables: Mapping[Selector, Tensor] = field(default_factory=dict)
    """What selectors chose by content."""


def allowed(x: Selector, at: Places) -> Tensor:
    """Whether key j may be kept by query i of head h: bool, broadcastable to the places' shape."""
    if isinstance(x, Both):
        return reduce(torch.logical_and, (allowed(part, at) for part in x.parts))
    if isinstance(x, Either):
        return reduce(torch.logical_or, (allowed(part, at) for part in x.parts))
    if isinstance(x, Sinks):
        return at.j < x.n
    if isinstance(x, Prefix):
        n = prefix_of(x, at.geometry)
        return (at.j < n) | (at.i < n)
    if isinstance(x, Keys | Heads):
        return at.tables[x][at.b, at.h, at.j if isinstance(x, Keys) else at.i]
    on_grid = (at.i >= at.geometry.prefix) & (at.j >= at.geometry.prefix)
    if isinstance(x, Shifted):
        return on_grid & (group(x, at.geometry, at.h, at.heads, at.i) == group(x, at.geometry, at.h, at.heads, at.j))
    if isinstance(x, Regions):
        table = at.tables[x]
        return on_grid & table[at.b, at.h, region(x, at.geometry, at.i), region(x, at.geometry, at.j)]
    if isinstance(x, Window | Halo):
        for axis, (query, key) in enumerate(
            zip(at.geometry.coordinates(at.i), at.geometry.coordinates(at.j), strict=True)
        ):
            (first, last), step = reach(x, at.geometry.grid, axis, query)
            on_grid = on_grid & (key >= first) & (key <= last)
            if step > 1:
                on_grid = on_grid & (key % step == query % step)
        return on_grid
    raise SelectionError(f"{x} ranks keys, and does not say which may be kept")


def prefix_of(x: Prefix, geometry: Geometry) -> int:
    """How many tokens it means."""
    return geometry.prefix if x.n is None else x.n


def reach(x: Window | Halo, grid: tuple[int, ...], axis: int, query: Tensor) -> tuple[Range, int]:
    """(first, last) key place a query at `query` keeps on an axis, and the step between keys (those of the query's own
    residue count).  The ends lie within the axis but for those of a halo, which may stick out."""
    axes, size = len(grid), grid[axis]
    if isinstance(x, Halo):
        block, halo = per_axis(x.block, axes)[axis], per_axis(x.halo, axes)[axis]
        start = query // block * block
        return (start - halo, start + (block + halo - 1)), 1
    step = per_axis(x.dilation, axes)[axis]
    kept = min(per_axis(x.size, axes)[axis], size // step)
    stride = min(per_axis(x.stride, axes)[axis], kept)
    residue, place = query % step, query // step
    last = size // step + (residue < size % step).to(query.dtype) - 1  # of the places with this residue
    if per_axis(x.causal, axes)[axis]:
        leader = torch.minimum(place // stride * stride + stride - 1, last)
        low, high = (leader - kept + 1).clamp(min=0), place
    else:
        left, right = kept // 2, kept // 2 + kept % 2 - 1
        leader = torch.minimum(place // stride * stride + stride // 2, last)
        centre = torch.maximum(torch.minimum(leader, last - right), torch.full_like(leader, left))
        low, high = centre - left, centre + right
    return (low * step + residue, high * step + residue), step


def region_counts(x: Regions, geometry: Geometry) -> tuple[int, ...]:
    """How many regions each axis has; the last of an axis may be smaller."""
    sizes = per_axis(x.size, len(geometry.grid))
    return tuple(-(-size // of) for size, of in zip(geometry.grid, sizes, strict=True))


def region(x: Regions, geometry: Geometry, token: Tensor) -> Tensor:
    """The number of a token's region, the last axis the fastest."""
    sizes = per_axis(x.size, len(geometry.grid))
    number = torch.zeros_like(token)
    for place, size, count in zip(geometry.coordinates(token), sizes, region_counts(x, geometry), strict=True):
        number = number * count + place // size
    return number


def group_size(x: Shifted, geometry: Geometry) -> int:
    """Tokens in a group: ceil(N / groups)."""
    return -(-(geometry.tokens - geometry.prefix) // x.groups)


def group(x: Shifted, geometry: Geometry, head: Tensor, heads: int, token: Tensor) -> Tensor:
    """The number of a token's group in a head."""
    size = group_size(x, geometry)
    shift = torch.where(head < heads // 2, 0, size // 2)
    return ((token - geometry.prefix).clamp(min=0) + shift) // size
