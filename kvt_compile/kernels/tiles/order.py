"""Queries of a grid -> tiles of at most M queries that keep nearly the same keys.

A tile is a patch of the grid (4 x 8 tokens for M = 32), so that the windows of its queries overlap; under a dilation it
has one residue of each axis, and it does not cross the border of a region or block that holds M queries or more.

    token -> (residue, cell, patch, place in the patch)   sorted;   one tile for each (residue, cell, patch)
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kvt_compile.select.geometry import Geometry, needs_grid
from kvt_compile.select.maps import prefix_of
from kvt_compile.select.values import Halo, Prefix, Regions, Selector, Sinks, Window, leaves, per_axis


def query_tiles(x: Selector, geometry: Geometry, queries: int, lanes: int) -> list[Tensor]:
    """The queries of each tile, at most `lanes`, int64; tokens before the grid, and those that a `prefix` gives every
    key, stand in tiles of their own, first."""
    return _tiles(x, geometry, queries, lanes, {prefix_of(y, geometry) for y in leaves(x) if isinstance(y, Prefix)})


def key_tiles(x: Selector, geometry: Geometry, keys: int, lanes: int) -> list[Tensor]:
    """The same of keys, for tiles of keys with lists of queries: what every query keeps stands apart, sinks too."""
    borders = {prefix_of(y, geometry) for y in leaves(x) if isinstance(y, Prefix)}
    return _tiles(x, geometry, keys, lanes, borders | {y.n for y in leaves(x) if isinstance(y, Sinks) and y.n < keys})


def _tiles(x: Selector, geometry: Geometry, tokens: int, lanes: int, borders: set[int]) -> list[Tensor]:
    on_grid = geometry.prefix if needs_grid(x) else tokens
    ends = sorted({0, on_grid, *(y for y in borders if y < on_grid)})
    plain = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
    tiles = [part for run in plain for part in run.split(lanes)]
    if on_grid < tokens:
        cuts = [y - on_grid for y in borders if y > on_grid]
        for patch in _patches(x, geometry, lanes):
            wide = torch.zeros_like(patch)
            for cut in cuts:
                wide += patch < cut
            parts = [patch[wide == n] for n in wide.unique().flip(0).tolist()] if cuts else [patch]
            tiles += [part + on_grid for part in parts]
    return tiles


def _patches(x: Selector, geometry: Geometry, lanes: int) -> list[Tensor]:
    """Numbers of the grid's tokens, the prefix not counted."""
    grid, axes = geometry.grid, len(geometry.grid)
    token = torch.arange(math.prod(grid))
    steps = next((per_axis(y.dilation, axes) for y in leaves(x) if isinstance(y, Window)), (1,) * axes)
    cells = next((per_axis(y, axes) for y in _cells(x, axes) if math.prod(per_axis(y, axes)) >= lanes), grid)
    room = [min(cell, -(-size // step)) for cell, size, step in zip(cells, grid, steps, strict=True)]
    patch = patch_sizes(room, lanes)
    groups: list[tuple[Tensor, int]] = []
    inner: list[tuple[Tensor, int]] = []
    number = token
    for axis in reversed(range(axes)):
        place, number = number % grid[axis], number // grid[axis]
        residue, place = place % steps[axis], place // steps[axis]
        cell, place = place // cells[axis], place % cells[axis]
        groups += [(place // patch[axis], grid[axis]), (cell, grid[axis]), (residue, steps[axis])]
        inner += [(place % patch[axis], patch[axis])]
    group = _number(groups)
    order = torch.argsort(group * lanes + _number(inner), stable=True)
    _, counts = torch.unique_consecutive(group[order], return_counts=True)
    return list(token[order].split(counts.tolist()))


def _cells(x: Selector, axes: int) -> list[int | tuple[int, ...]]:
    """Sizes within which queries keep the same keys."""
    return [y.size if isinstance(y, Regions) else y.block for y in leaves(x) if isinstance(y, Regions | Halo)]


def patch_sizes(room: list[int], lanes: int) -> list[int]:
    """Powers of two with a product of at most `lanes`, as equal as the room on each axis lets them be."""
    patch = [1] * len(room)
    while math.prod(patch) * 2 <= lanes:
        smallest = min(
            (n for n in reversed(range(len(room))) if patch[n] < room[n]), key=patch.__getitem__, default=None
        )
        if smallest is None:
            break
        patch[smallest] *= 2
    return patch


def _number(digits: list[tuple[Tensor, int]]) -> Tensor:
    """Digits with their bases, the least significant first."""
    number, base = torch.zeros_like(digits[0][0]), 1
    for digit, size in digits:
        number, base = number + digit * base, base * size
    return number
