"""Where the tokens of a site stand: `prefix` tokens first, then a grid of 1 to 3 axes, its last axis the fastest.

prefix=1, grid=(64, 64)   ->   token 0 is off the grid, token 1 + 64*y + x stands at (y, x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvt_compile.select.values import (
    AXES,
    Both,
    Either,
    Given,
    Halo,
    Prefix,
    Regions,
    SelectionError,
    Selector,
    Shifted,
    Sinks,
    Window,
    leaves,
    per_axis,
)

ON_GRID = (Window, Halo, Regions, Shifted)
"""Selectors that ask where on the grid a token stands; they keep no token off the grid, and nothing for one."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of the grid's axes, and how many tokens stand before it."""

    grid: tuple[int, ...]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + math.prod(self.grid)

    def coordinates(self, token: Tensor) -> tuple[Tensor, ...]:
        """Of tokens on the grid, one tensor an axis; of a token before it those of the first that is on it."""
        left = (token - self.prefix).clamp(min=0)
        found = []
        for size in reversed(self.grid):
            found.append(left % size)
            left = left // size
        return tuple(reversed(found))

    @classmethod
    def read(cls, text: str) -> Geometry:
        """What `str` wrote: `64x64 + 1`."""
        grid, _, prefix = text.partition(" + ")
        return cls(() if grid in ("", "no grid") else tuple(map(int, grid.split("x"))), int(prefix or 0))

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid)) or "no grid"
        return f"{grid} + {self.prefix}" if self.prefix else grid


def needs_grid(x: Selector | None) -> bool:
    """Whether a selection asks where on a grid a token stands."""
    return x is not None and any(isinstance(y, ON_GRID) or _by_region(y) for y in leaves(x))


def _by_region(x: Selector) -> bool:
    return isinstance(x, Given) and x.size is not None


def needs_prefix(x: Selector | None) -> bool:
    """Whether it asks how many tokens stand before the grid."""
    return needs_grid(x) or (x is not None and any(y == Prefix() for y in leaves(x)))


def resolve_grid(grid: Sequence[int] | int | None, prefix: int, tokens: int) -> tuple[int, ...]:
    """A grid as a user writes it: one size may be -1, whatever is left; None is one axis.  Raises SelectionError."""
    grid = (-1,) if grid is None else (grid,) if isinstance(grid, int) else tuple(grid)
    unknown = [n for n, size in enumerate(grid) if size == -1]
    if len(unknown) > 1:
        raise SelectionError(f"grid is {grid}, expected at most one axis of -1 (whatever is left)")
    if unknown:
        rest = math.prod([size for size in grid if size != -1])  # a list, which Dynamo traces
        left = tokens - prefix
        if rest < 1 or left < 1 or left % rest:
            raise SelectionError(f"grid is {grid}, but {tokens} tokens without a prefix of {prefix} do not divide so")
        grid = tuple(left // rest if size == -1 else size for size in grid)
    return grid


def check_geometry(x: Selector, geometry: Geometry, queries: int, keys: int) -> None:
    """Raises SelectionError unless a selection means something for so many tokens laid out so."""
    grid, prefix = geometry.grid, geometry.prefix
    if prefix < 0:
        raise SelectionError(f"prefix is {prefix}, expected how many tokens stand before the grid, at least 0")
    if not needs_grid(x):
        return
    if not 1 <= len(grid) <= AXES or any(size < 1 for size in grid):
        raise SelectionError(f"{x} needs a grid of 1 to {AXES} axes of at least 1 token, got grid={grid}")
    if not queries == keys == geometry.tokens:
        raise SelectionError(
            f"{x} on a grid of {geometry} needs as many queries and keys as there are tokens, {geometry.tokens}: there "
            f"are {queries} queries and {keys} keys"
        )
    for part in leaves(x):
        for what in ("size", "dilation", "stride", "causal", "block", "halo"):
            value = getattr(part, what, None)
            if isinstance(value, tuple) and len(value) != len(grid):
                raise SelectionError(f"{part} has {len(value)} numbers for a grid of {len(grid)} axes, {geometry}")
        if isinstance(part, Window):
            for size, dilation in zip(grid, per_axis(part.dilation, len(grid)), strict=True):
                if dilation > size:
                    raise SelectionError(f"{part}: a dilation of {dilation} is larger than an axis of {size} tokens")
    if prefix and not keeps_prefix(x, prefix):
        raise SelectionError(
            f"{x} keeps no key for the {prefix} tokens before the grid, whose rows would be zeros: write ({x}) | prefix"
        )


def groups_of_heads(x: Regions, heads: int) -> int:
    """How many groups of heads choose together.  Raises SelectionError where the heads do not divide so."""
    groups = {"each": heads, "all": 1}[x.heads] if isinstance(x.heads, str) else x.heads
    if heads % groups:
        raise SelectionError(f"{x}: {heads} heads do not divide into {groups} groups")
    return groups


def keeps_prefix(x: Selector, prefix: int) -> bool:
    """Whether every token before the grid, as a query, keeps a key."""
    if isinstance(x, Either):
        return any(keeps_prefix(part, prefix) for part in x.parts)
    if isinstance(x, Both):
        return all(keeps_prefix(part, prefix) for part in x.parts)
    if isinstance(x, Prefix | Sinks):
        return True
    return not isinstance(x, ON_GRID) and not _by_region(x)
