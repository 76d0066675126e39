"""A selection and sizes -> what a GPU's kernel walks: as `lists`, but any COLS keys of a list that follow one another
are a tile, and all of it lies on the device.

    tile x of queries, batch b, head h   ->   list   list_of[x + h * head_tiles] + (b * heads + h) * head_lists
    list                                 ->   places start[list] .. start[list + 1] - 1
    place                                ->   a key, and for each lane of the tile one bit: whether it may keep it

and turned round, tiles of keys with lists of queries, for dK and dV.  Of `regions` a place is one of a region's tokens:
blocks of `width` tokens, the last ones of a smaller region none.

Geometry decides once for each shape; lists that say the same are one.  Of `regions` the blocks of each list are put
together in each call, by operators that read nothing back; where tensors choose in another way blocks are tiles of
tokens, and which pairs of a listed block are kept is a condition of the score (`conditions`).  Memory is
O(tokens * kept / lanes), and there a number for each pair of tiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.op.selection import Selection
from kvt_compile.kernels.tiles.conditions import Tables, needs_tables
from kvt_compile.kernels.tiles.lists import MOST, block_of, region_tiles, some_of
from kvt_compile.kernels.tiles.order import key_tiles, query_tiles
from kvt_compile.kernels.tiles.placed import placed, stays
from kvt_compile.kernels.tiles.touched import queries_and_keys, touched
from kvt_compile.select.content import chosen
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import Places, allowed, region, region_counts
from kvt_compile.select.values import Regions, Selector, Shifted, by_content, leaves, routed

LANES = 64
"""Of a tile at most: one bit each."""


@dataclass(frozen=True, eq=False)
class Walk:
    """Arrays on the device; see the head of the file."""

    lane: Tensor
    """int32 `[tiles, lanes]`, or where heads have their own `[B, heads, tiles, lanes]`: the token of each lane; past a
    tile's last one the number of tokens, which is none."""
    list_of: Tensor
    """int32 `[tiles]`, or where heads differ `[heads * tiles]`"""
    start: Tensor
    """int32: list n is the places start[n] .. start[n + 1] - 1."""
    token: Tensor
    """int32 `[places]`, or of regions `[blocks, width]`: the key (turned: the query); past the last, how many there
    are."""
    may: Tensor | None
    """int64 `[places]`; None: every lane may keep every token of its list."""
    block: Tensor | None
    """int32: where tensors choose, place p is token p % width of block[p // width]."""
    width: int
    head_lanes: int
    """From the lanes of one head to those of the next; 0: all heads have the same.  Turned: of one key head."""
    head_tiles: int
    head_lists: int
    longest: int
    """Tokens of the longest list."""
    listed: int
    """Tokens of all lists, times the lanes of their tiles, of one batch item and head on average."""

    @property
    def tiles(self) -> int:
        return self.lane.shape[-2]


class Walks:
    """What the kernels of one call walk: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`; tables: `conditions.tables_of`, where
    they are known."""

    def __init__(self, selection: Selection, q: Tensor, k: Tensor, tables: Sequence[Tensor] = ()) -> None:
        assert selection.allowed is not None
        self.allowed, self.geometry = selection.allowed, selection.geometry
        self.q, self.k = q, k
        self._tables = Tables(selection, q, k, tables) if needs_tables(self.allowed) else None
        self._known: dict[tuple[int, bool], Walk] = {}

    def of(self, lanes: int, turned: bool = False) -> Walk:
        """Tiles of so many lanes: at most LANES.  turned: tiles of keys with lists of queries."""
        if (lanes, turned) not in self._known:
            self._known[lanes, turned] = self._made(lanes, turned)
        return self._known[lanes, turned]

    def _made(self, lanes: int, turned: bool) -> Walk:
        if self._tables is not None:
            return _of_tables(self._tables, lanes, turned)
        if by_content(self.allowed):
            return _of_regions(self.allowed, self.geometry, self._best, self.k.shape[2], lanes, turned)
        sizes = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        found = _of_geometry(self.allowed, self.geometry, *sizes, lanes, turned, self.q.device)
        stays(found, self.q.device)
        return found

    @cached_property
    def _best(self) -> Tensor:
        """Which regions each region of queries keeps, `[B, Hq, regions, kept]`, in order."""
        route = routed(self.allowed)
        assert route is not None
        best = chosen(route, self.geometry, self.q, self.k).sort(-1).values
        return best.repeat_interleave(self.q.shape[1] // best.shape[1], 1)


def _moved(make: Callable[[], Walk], device: torch.device) -> Walk:
    """Its tensors on a device (`placed`)."""
    made: list[Walk] = []

    def tensors() -> tuple[Tensor, ...]:
        made.append(make())
        return tuple(y for y in vars(made[0]).values() if isinstance(y, Tensor))

    found = iter(placed(tensors, device))
    moved: dict[str, Any] = {name: next(found) if isinstance(y, Tensor) else y for name, y in vars(made[0]).items()}
    return Walk(**moved)


# ---- by geometry -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _of_geometry(
    x: Selector, geometry: Geometry, heads: int, queries: int, keys: int, lanes: int, turned: bool, device: torch.device
) -> Walk:
    return _moved(lambda: _made(x, geometry, heads, queries, keys, lanes, turned), device)


def _made(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int, lanes: int, turned: bool) -> Walk:
    differ = heads > 1 and any(isinstance(y, Shifted) for y in leaves(x))
    kinds = (0, heads - 1) if differ else (0,)  # the first half of the heads, and the second
    tiles = (key_tiles if turned else query_tiles)(x, geometry, keys if turned else queries, lanes)
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    lists: list[tuple[Tensor, Tensor]] = []
    of: dict[int, list[int]] = {head: [] for head in kinds}
    listed = 0
    for head in kinds:
        if turned:
            several = _turned(x, geometry, heads, queries, keys, head, tiles)
        else:
            several = (block_of(x, geometry, keys, head, heads, tile) for tile in tiles)
        for tile, (tokens, bits) in zip(tiles, several, strict=True):
            name = tuple(tokens.tolist()), tuple(bits.tolist())
            if name not in known:
                known[name] = len(lists)
                lists.append((tokens.int(), bits))
            of[head].append(known[name])
            listed += len(tile) * len(tokens)
    every = [n for head in range(heads if differ else 1) for n in of[kinds[0] if head < heads // 2 else kinds[-1]]]
    lengths = torch.tensor([len(tokens) for tokens, _ in lists])
    if int(lengths.sum()) > MOST:
        raise MemoryError(f"{int(lengths.sum())} keys in lists of tiles, at most {MOST} fit: {x}")
    may = torch.cat([bits for _, bits in lists])
    return Walk(
        _lanes(tiles, lanes, keys if turned else queries), torch.tensor(every, dtype=torch.int32), _starts(lengths),
        torch.cat([tokens for tokens, _ in lists]), None if bool((may == -1).all()) else may, None, 1,
        head_lanes=0, head_tiles=len(tiles) if differ else 0, head_lists=0, longest=int(lengths.max()),
        listed=listed // len(kinds),
    )  # fmt: skip


def _turned(
    x: Selector, geometry: Geometry, heads: int, queries: int, keys: int, head: int, tiles: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The queries that may keep a key of each tile of keys, looked for where a tile of queries lists one."""
    rows = query_tiles(x, geometry, queries, LANES)
    listed = [block_of(x, geometry, keys, head, heads, tile)[0] for tile in rows]
    key, order = torch.cat(listed).sort(dim=-1, stable=True)
    of = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(some) for some in listed]))[order]
    ends = torch.searchsorted(key, torch.arange(keys + 1)).tolist()
    zero = torch.zeros((), dtype=torch.int64)
    for tile in tiles:
        near = torch.cat([of[ends[j] : ends[j + 1]] for j in tile.tolist()]).unique()
        some = torch.cat([zero.new_empty(0), *(rows[n] for n in near.tolist())]).sort().values
        may = allowed(x, Places(geometry, heads, zero, torch.tensor(head), some, tile[:, None]))
        yield some_of(some, may.expand(len(tile), len(some)))


def _lanes(tiles: Sequence[Tensor], lanes: int, tokens: int) -> Tensor:
    found = torch.full((len(tiles), lanes), tokens, dtype=torch.int32)
    for row, tile in zip(found, tiles, strict=True):
        row[: len(tile)] = tile
    return found


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()


# ---- by content ------------------------------------------------------------------------------------------------------


def _of_regions(x: Selector, geometry: Geometry, best: Tensor, tokens: int, lanes: int, turned: bool) -> Walk:
    """Blocks: one for each region, then those of the prefix.  Lists of a head: one for each region, then all blocks,
    for the tokens before the grid."""
    route = routed(x)
    assert route is not None
    static = _region_walk(x, route, geometry, tokens, lanes, best.device)
    stays(static, best.device)
    (*outer, regions, kept), blocks = best.shape, static.token.shape[0]
    every = torch.arange(blocks, device=best.device)
    before = blocks - regions
    if turned:  # key region -> the query regions that chose it: pairs of both in the order of the first
        first = torch.cat([best.flatten(-2), every[:regions].repeat(before).expand(*outer, -1)], -1)
        second = torch.cat([every[:regions].repeat_interleave(kept), every[regions:].repeat_interleave(regions)])
        ordered, order = first.sort(dim=-1, stable=True)
        block, start = second[order], torch.searchsorted(ordered, every[:regions].expand(*outer, -1).contiguous())
    else:
        block = torch.cat([best, every[regions:].expand(*outer, regions, -1)], -1).flatten(-2)
        start = (every[:regions] * (kept + before)).expand(*outer, -1)
    block = torch.cat([block, every.expand(*outer, -1)], -1)
    a_head, width = block.shape[-1], static.width
    heads = torch.arange(outer[0] * outer[1], device=best.device).view(*outer, 1)
    start = torch.cat([start, torch.full_like(start[..., :1], a_head - blocks)], -1) + heads * a_head
    start = torch.cat([start.flatten(), torch.full_like(start.flatten()[:1], block.numel())]) * width
    if block.numel() * width > MOST:
        raise MemoryError(f"{block.numel()} blocks of {width} tokens in lists of tiles, at most {MOST} fit: {x}")
    wide = static.longest if geometry.prefix else 0
    return dataclasses.replace(
        static, start=start.int(), block=block.int().flatten(),
        longest=tokens if turned else max(min(tokens, kept * width + geometry.prefix), wide),
        listed=static.listed + (tokens - geometry.prefix) * (tokens * kept // regions),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _region_walk(
    x: Selector, route: Regions, geometry: Geometry, tokens: int, lanes: int, device: torch.device
) -> Walk:
    """All of it but the lists."""
    return _moved(lambda: _region_tiles(x, route, geometry, tokens, lanes), device)


def _region_tiles(x: Selector, route: Regions, geometry: Geometry, tokens: int, lanes: int) -> Walk:
    tiles = region_tiles(x, route, geometry, tokens, lanes)
    regions = math.prod(region_counts(route, geometry))
    place = torch.arange(geometry.prefix, tokens)
    of = region(route, geometry, place)
    width = int(torch.bincount(of).max())
    sets = [place[of == n] for n in range(regions)] + list(torch.arange(geometry.prefix).split(width))
    list_of = [int(region(route, geometry, x)) if x >= geometry.prefix else regions for x in (y[0] for y in tiles)]
    none = torch.zeros(0, dtype=torch.int32)
    return Walk(
        _lanes(tiles, lanes, tokens), torch.tensor(list_of, dtype=torch.int32), none,
        _lanes([part for part in sets if len(part)], width, tokens), None, None, width,
        head_lanes=0, head_tiles=0, head_lists=regions + 1, longest=tokens,
        listed=geometry.prefix * (2 * tokens - geometry.prefix),
    )  # fmt: skip


# ---- by tables -------------------------------------------------------------------------------------------------------


def _of_tables(tables: Tables, lanes: int, turned: bool) -> Walk:
    """A tile's list: the blocks of LANES tokens that it may touch, in a row as long as there are blocks; which pairs
    are kept the condition in the score says."""
    queries, keys = queries_and_keys(tables, *((LANES, lanes) if turned else (lanes, LANES)), turned)
    tile, of = (keys, queries) if turned else (queries, keys)
    hit = touched(tables, queries, keys)
    hit = (hit.transpose(-1, -2) if turned else hit).expand(tables.batch, tables.heads, tile.count, of.count)
    order = hit.to(torch.int8).sort(dim=-1, descending=True, stable=True)
    heads = torch.arange(tables.batch * tables.heads, device=hit.device).view(tables.batch, tables.heads, 1, 1)
    block = order.indices + (heads * of.count if of.own else 0)
    if block.numel() * LANES > MOST:
        raise MemoryError(
            f"{block.numel()} blocks of {LANES} tokens in lists of tiles, at most {MOST} fit: {tables.allowed}"
        )
    first = torch.arange(hit[..., 0].numel(), device=hit.device).view(hit.shape[:-1]) * (of.count * LANES)
    start = torch.stack([first, first + hit.sum(-1) * LANES], -1)
    tokens = tables.queries if turned else tables.keys
    return Walk(
        tile.tokens.int().contiguous(), 2 * torch.arange(tile.count, dtype=torch.int32, device=hit.device),
        start.int().flatten(), of.tokens.int().contiguous(), None, block.int().flatten(), LANES,
        head_lanes=tile.count * lanes if tile.own else 0, head_tiles=0, head_lists=2 * tile.count,
        longest=tokens, listed=tables.queries * tables.keys,
    )  # fmt: skip
