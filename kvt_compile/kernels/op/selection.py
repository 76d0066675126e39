"""The arguments `select`, `grid` and `prefix` of an op -> `Selection`: which keys may be kept, and how they are ranked.

    "(window(13) | prefix) & mass(0.9)", [64, 64], 1   ->   Selection(window(13) | prefix, mass(0.9), 64x64 + 1)

How many keys a ranking by `topk` keeps is the op's argument `topk`, which `set_topk` changes; of a `topk(...)` in the
text only its `ties` count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from kvt_compile.select.content import tables
from kvt_compile.select.geometry import Geometry, check_geometry
from kvt_compile.select.maps import Places, allowed
from kvt_compile.select.text import parse
from kvt_compile.select.values import Heads, Mass, Regions, Selector, Shifted, TopK, leaves, split


@dataclass(frozen=True)
class Selection:
    """What a node keeps keys by, besides k."""

    allowed: Selector | None
    """None: every key."""
    rank: TopK | Mass | None
    geometry: Geometry

    def tables(self, q: Tensor, k: Tensor) -> dict[Selector, Tensor]:
        """What its selectors choose by content, of whole q and k."""
        return {} if self.allowed is None else tables(self.allowed, self.geometry, q, k)

    def map(self, heads: int, at: Sequence[Tensor], chosen: dict[Selector, Tensor]) -> Tensor | None:
        """Whether keys may be kept at coordinates b, h, i, j (int64, broadcasting); None: all may."""
        if self.allowed is None:
            return None
        return allowed(self.allowed, Places(self.geometry, heads, at[0], at[1], at[2], at[3], chosen))


def selection_of(select: str, grid: Sequence[int] | None, prefix: int, queries: int, keys: int) -> Selection | None:
    """None for an empty text.  Raises SelectionError, for sizes that are known only at run time only when it runs."""
    if not select:
        return None
    return _selection(select, tuple(grid or ()), prefix, queries, keys)


@lru_cache(maxsize=1024)
def _checked(select: str, grid: tuple[int, ...], prefix: int, queries: int, keys: int) -> Selection:
    allowed, rank = split(parse(select))
    geometry = Geometry(grid, prefix)
    if allowed is not None:
        check_geometry(allowed, geometry, queries, keys)
    return Selection(allowed, rank, geometry)


def _selection(select: str, grid: tuple[int, ...], prefix: int, queries: int, keys: int) -> Selection:
    if all(type(x) is int for x in (*grid, prefix, queries, keys)):
        return _checked(select, grid, prefix, queries, keys)
    return Selection(*split(parse(select)), Geometry(grid, prefix))


@lru_cache(maxsize=1024)
def counts_heads(select: str) -> bool:
    """Whether what a head keeps depends on which heads there are besides it."""
    return any(isinstance(x, Shifted | Regions | Heads) for x in leaves(parse(select)))


@lru_cache(maxsize=1024)
def canonical_selection(select: str) -> str:
    """The text as the parsed selection prints it: the only one a spec holds; empty where it says no more than `topk`
    does.  Raises SelectionError."""
    if not select:
        return ""
    allowed, rank = split(parse(select))
    plain = allowed is None and isinstance(rank, TopK) and rank.ties == "all"
    return "" if plain else str(parse(select))
