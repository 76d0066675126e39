"""A tile of queries -> keys that one of them may keep: a superset of what `select/maps.py` allows, found on the axes
and not by looking at every key.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import group, prefix_of, reach
from kvt_compile.select.values import Both, Either, Halo, Prefix, SelectionError, Selector, Shifted, Sinks, Window


def candidates(x: Selector, geometry: Geometry, keys: int, head: int, heads: int, queries: Tensor) -> Tensor:
    """Sorted numbers of keys."""
    if isinstance(x, Both | Either):
        parts = [candidates(part, geometry, keys, head, heads, queries) for part in x.parts]
        if isinstance(x, Either):
            union: Tensor = torch.cat(parts).unique()
            return union
        return reduce(lambda a, b: a[torch.isin(a, b)], sorted(parts, key=len))
    if isinstance(x, Sinks):
        return torch.arange(min(x.n, keys))
    if isinstance(x, Prefix):
        n = prefix_of(x, geometry)
        return torch.arange(keys if bool((queries < n).any()) else min(n, keys))
    on_grid = queries[queries >= geometry.prefix]
    if not len(on_grid):
        return on_grid
    if isinstance(x, Window | Halo):
        return _of_axes(x, geometry, on_grid)
    if isinstance(x, Shifted):
        every = torch.arange(geometry.prefix, keys)
        mine, theirs = (group(x, geometry, torch.tensor(head), heads, tokens) for tokens in (on_grid, every))
        return every[(theirs >= mine.min()) & (theirs <= mine.max())]
    raise SelectionError(f"{x} chooses by content")


def _of_axes(x: Window | Halo, geometry: Geometry, queries: Tensor) -> Tensor:
    number = torch.zeros(1, dtype=torch.int64)
    for axis, place in enumerate(geometry.coordinates(queries)):
        size = geometry.grid[axis]
        (first, last), step = reach(x, geometry.grid, axis, place)
        runs = [
            torch.arange(max(0, int(first[same].min())), min(size - 1, int(last[same].max())) + 1, step)
            for same in ((place % step == residue) for residue in (place % step).unique())
        ]
        number = (number[:, None] * size + torch.cat(runs).unique()).flatten()
    return number + geometry.prefix
