"""Tables of a selection -> tiles of queries, blocks of keys, and which of them may touch: a superset, found from what
the tables say of whole tiles.

    window    low and high of a tile's queries, taken together, and where the keys of a block stand, overlap
    keys      a block has a chosen key           heads     a tile has a query that its head is chosen for
    regions   a region of the tile chose a region of the block

What is chosen is put together, each head for itself: chosen keys first, in blocks of their own, so that 64 of 4,096
keys are in one block and not in every one.  The others keep the tiles that geometry gives them, with holes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor
from torch.nn import functional

from kvt_compile.kernels.tiles.conditions import FAR, Tables
from kvt_compile.kernels.tiles.order import key_tiles, query_tiles
from kvt_compile.kernels.tiles.placed import placed, stays
from kvt_compile.select.content import how_many
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import (
    Both,
    Either,
    Halo,
    Heads,
    Keys,
    Prefix,
    Regions,
    Selector,
    Shifted,
    Sinks,
    Window,
    leaves,
)


@dataclass(frozen=True, eq=False)
class Cut:
    """Tokens in tiles."""

    tokens: Tensor
    """int64 `[tiles, lanes]`, or where heads have their own `[B, heads, tiles, lanes]`: `none` is no token."""
    none: int
    own: bool
    count: int
    shared: int = 1
    """Query heads for each head of `tokens`."""

    @property
    def of_heads(self) -> Tensor:
        """`[tiles, lanes]` or `[B, Hq, tiles, lanes]`"""
        return self.tokens.repeat_interleave(self.shared, 1) if self.own and self.shared > 1 else self.tokens


def queries_and_keys(tables: Tables, lanes: int, width: int, turned: bool = False) -> tuple[Cut, Cut]:
    """Queries in tiles of `lanes`, keys in blocks of `width`.  turned: query heads that share keys have the same
    blocks."""
    x, geometry = tables.allowed, tables.geometry
    some = dict.fromkeys(leaves(x))
    of_heads = [tables.of[y]["chosen"] for y in some if isinstance(y, Heads)]
    each = [tables.of[y]["chosen"] for y in some if isinstance(y, Keys)]
    static = [
        _static(make, x, geometry, n, size, tables.device)[0]
        for make, n, size in ((query_tiles, tables.queries, lanes), (key_tiles, tables.keys, width))
    ]
    for tokens in static:
        stays(tokens, tables.device)
    of_keys = reduce(torch.logical_or, each) if each else None
    most = sum(how_many(y.k, tables.keys) for y in some if isinstance(y, Keys))
    shared = 1
    if of_keys is not None and turned and tables.heads > tables.kv_heads:
        shared = tables.heads // tables.kv_heads
        of_keys, most = of_keys.unflatten(1, (-1, shared)).any(2), most * shared
    of_queries = reduce(torch.logical_or, of_heads) if of_heads else None
    return (
        _cut(static[0], of_queries, tables.queries, tables.queries, 1),
        _cut(static[1], of_keys, min(most, tables.keys), tables.keys, shared),
    )


@torch.no_grad()
def _cut(static: Tensor, chosen: Tensor | None, most: int, none: int, shared: int) -> Cut:
    """chosen: bool `[B, heads, tokens]`, at most so many of a head."""
    if chosen is None:
        return Cut(static, none, False, static.shape[0])
    tiles, lanes = static.shape
    flags = functional.pad(chosen, (0, 1))[..., static.flatten()]  # of each place in the static order
    order = flags.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    first = torch.where(flags.gather(-1, order), static.flatten()[order], none)
    first = functional.pad(first, (0, -most % lanes), value=none).unflatten(-1, (-1, lanes))
    rest = static.masked_fill(flags.unflatten(-1, (tiles, lanes)), none)
    tokens = torch.cat([first, rest], -2)
    return Cut(tokens, none, True, tokens.shape[-2], shared)


@lru_cache(maxsize=256)
def _static(
    make: Callable[[Selector, Geometry, int, int], list[Tensor]],
    x: Selector,
    geometry: Geometry,
    tokens: int,
    lanes: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """`[tiles, lanes]`"""

    def rows() -> tuple[Tensor, ...]:
        tiles = make(x, geometry, tokens, lanes)
        return (torch.stack([torch.cat([tile, tile.new_full((lanes - len(tile),), tokens)]) for tile in tiles]),)

    return placed(rows, device)


def touched(tables: Tables, queries: Cut, keys: Cut) -> Tensor:
    """bool `[B, Hq, tiles, blocks]`, or what broadcasts to it."""
    return _touched(tables.allowed, tables, queries, keys)


def _touched(x: Selector, tables: Tables, queries: Cut, keys: Cut) -> Tensor:
    if isinstance(x, Both | Either):
        parts = [_touched(part, tables, queries, keys) for part in x.parts]
        return reduce(torch.logical_and if isinstance(x, Both) else torch.logical_or, parts)
    if isinstance(x, Sinks):
        return (keys.of_heads < min(x.n, keys.none)).any(-1).unsqueeze(-2)
    table = tables.of[x]
    if isinstance(x, Prefix):
        mine, theirs = _any(table["queries"], queries), _any(table["keys"], keys)
        return mine.unsqueeze(-1) | theirs.unsqueeze(-2)
    if isinstance(x, Heads):
        return _any(table["chosen"], queries).unsqueeze(-1)
    if isinstance(x, Keys):
        return _any(table["chosen"], keys).unsqueeze(-2)
    if isinstance(x, Regions):
        chosen = table["chosen"]
        mine = _regions(table["region of queries"], queries, chosen.shape[-1])
        theirs = _regions(table["region of keys"], keys, chosen.shape[-1])
        return (mine @ chosen.float() @ theirs.transpose(-1, -2)) > 0
    if isinstance(x, Shifted):
        (low, high), (first, last) = (
            _ends(table[f"group of {name}"], cut) for name, cut in (("queries", queries), ("keys", keys))
        )
        return (low.unsqueeze(-1) <= last.unsqueeze(-2)) & (first.unsqueeze(-2) <= high.unsqueeze(-1))
    assert isinstance(x, Window | Halo)
    found = None
    for low, high, at in zip(table["low"], table["high"], table["at"], strict=True):
        least, _ = _ends(low, queries)
        _, most = _ends(high, queries)
        first, last = _ends(at, keys)
        here = (least.unsqueeze(-1) <= last.unsqueeze(-2)) & (first.unsqueeze(-2) <= most.unsqueeze(-1))
        found = here if found is None else found & here
    assert found is not None
    if isinstance(x, Window):
        (low, high), (first, last) = (
            _ends(table[f"residue of {name}"], cut) for name, cut in (("queries", queries), ("keys", keys))
        )
        found = found & (low.unsqueeze(-1) <= last.unsqueeze(-2)) & (first.unsqueeze(-2) <= high.unsqueeze(-1))
    return found


def _of(table: Tensor, cut: Cut, nothing: int) -> Tensor:
    """What a table `[tokens]`, `[heads, tokens]` or `[B, heads, tokens]` says of each place of a cut."""
    tokens = cut.of_heads
    table = functional.pad(table, (0, 1), value=nothing)
    if not cut.own:
        found: Tensor = table[..., tokens]
        return found
    whole = table.expand(*tokens.shape[:2], -1)
    each: Tensor = whole.gather(-1, tokens.flatten(-2)).unflatten(-1, tokens.shape[-2:])
    return each


def _any(table: Tensor, cut: Cut) -> Tensor:
    return _of(table, cut, 0).any(-1)


def _ends(table: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each tile, those below 0 (which are of no token on the grid) left out."""
    found = _of(table, cut, -1)
    return torch.where(found < 0, FAR, found).amin(-1), torch.where(found == FAR, -1, found).amax(-1)


def _regions(table: Tensor, cut: Cut, regions: int) -> Tensor:
    """float32 `[..., tiles, regions]`: whether a tile has a token of each."""
    found = _of(table, cut, regions - 1).long()
    one_hot: Tensor = torch.zeros((*found.shape[:-1], regions), device=found.device).scatter_(-1, found, 1.0)
    return one_hot
