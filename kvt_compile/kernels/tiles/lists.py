"""A selection and sizes -> the arrays a kernel reads.

    tile x of queries, batch b, head h   ->   list  b * per_batch + h * per_head + x
    list                                 ->   numbers of blocks of keys
    block                                ->   runs (first key, how many, where their bits begin or -1)
    bits                                 ->   for each key of a run that not every lane may keep: one bit a lane

Geometry decides once for each shape, with one block a list.  `regions` makes the lists anew in each call, of blocks
that are regions; where tensors choose in another way blocks are tiles of keys, and which pairs of a listed block are
kept is a condition of the score (`conditions`).  Memory is O(queries * kept keys / lanes) for the parts of runs that
only some queries of a tile may keep, and a few words a run for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvt_compile.kernels.op.selection import Selection
from kvt_compile.kernels.tiles.conditions import Tables, needs_tables
from kvt_compile.kernels.tiles.keys import candidates
from kvt_compile.kernels.tiles.order import query_tiles
from kvt_compile.kernels.tiles.touched import queries_and_keys, touched
from kvt_compile.select.content import chosen
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import Places, allowed, region, region_counts
from kvt_compile.select.text import parse
from kvt_compile.select.values import Mass, Regions, Selector, Shifted, TopK, by_content, leaves, routed, split

BLOCK = 32
"""Keys of a block where tensors choose."""
MOST = 2**31 - 1
"""Queries and keys are counted in 32 bits."""


@dataclass(frozen=True, eq=False)
class TileLists:
    """Arrays on the CPU; see the head of the file."""

    query: Tensor
    """int32 `[tiles, lanes]`, or where heads have their own `[B, Hq, tiles, lanes]`: the query of each lane; lanes past
    a tile's last query repeat it."""
    count: Tensor
    """int32 `[tiles]` or `[B, Hq, tiles]`: how many lanes are queries."""
    list_start: Tensor
    """int64 `[lists + 1]`"""
    block: Tensor
    """int32: the blocks of each list, one list after the other."""
    block_start: Tensor
    """int64 `[blocks + 1]`"""
    run: Tensor
    """int64 `[runs, 3]`"""
    bits: Tensor
    """int32"""
    per_batch: int
    per_head: int
    longest: int
    """Keys of the longest list."""
    listed: int
    """Keys of all lists, times the queries of their tiles, of one batch item and head on average."""
    own_lanes: bool = False
    """Whether heads have lanes of their own."""

    @property
    def tiles(self) -> int:
        return self.count.shape[-1]


def refusal(select: str) -> str | None:
    """None, or why there are no lists for a selection, as a clause."""
    _, rank = split(parse(select))
    if isinstance(rank, Mass):
        return "mass(...) is not generated: which keys it keeps would hang on the order in which a kernel adds up"
    if isinstance(rank, TopK) and rank.ties != "all":
        return f"ties={rank.ties} is not generated: a threshold, which is what a backward is given, does not say it"
    return None


def tile_lists(selection: Selection, q: Tensor, k: Tensor, lanes: int, tables: Sequence[Tensor] = ()) -> TileLists:
    """The lists of one call for tiles of `lanes` queries: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, on the CPU; tables:
    `conditions.tables_of`, where they are known."""
    assert selection.allowed is not None
    sizes = q.shape[1], q.shape[2], k.shape[2]
    if max(sizes) > MOST:
        raise MemoryError(f"{sizes[1]} queries and {sizes[2]} keys: lists of so many fit in no memory")
    with torch.device("cpu"):  # whatever the default device is: a kernel takes pointers into these
        if not by_content(selection.allowed):
            return _of_geometry(selection.allowed, selection.geometry, *sizes, lanes)
        if needs_tables(selection.allowed):
            return _of_tables(Tables(selection, q, k, tables), lanes)
        return _of_regions(selection.allowed, selection.geometry, q, k, lanes)


@lru_cache(maxsize=64)
def _of_geometry(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int, lanes: int) -> TileLists:
    tiles = query_tiles(x, geometry, queries, lanes)
    lane_query, count = _lanes(tiles, lanes)
    kinds = range(heads) if any(isinstance(y, Shifted) for y in leaves(x)) else range(1)
    blocks = [block_of(x, geometry, keys, head, heads, lane_query[n]) for head in kinds for n in range(len(tiles))]
    block_start, run, bits, lengths = _joined(blocks, lanes)
    number = torch.arange(len(blocks))
    return TileLists(
        lane_query.int(), count.int(), torch.arange(len(blocks) + 1), number.int(), block_start, run, bits,
        per_batch=0, per_head=len(tiles) if len(kinds) > 1 else 0, longest=max(1, int(lengths.max())),
        listed=int((lengths * count.repeat(len(kinds))).sum()) // len(kinds),
    )  # fmt: skip


def _of_regions(x: Selector, geometry: Geometry, q: Tensor, k: Tensor, lanes: int) -> TileLists:
    """Blocks: one for each region, then the prefix, then every key."""
    route = routed(x)
    assert route is not None
    static = _region_blocks(x, route, geometry, q.shape[2], k.shape[2], lanes)
    best = chosen(route, geometry, q, k).sort(-1).values
    best = best.repeat_interleave(q.shape[1] // best.shape[1], 1)
    wide = len(static.count) - len(static.of)  # tiles of tokens before the grid, which keep every key
    rows = best[:, :, static.of].int()
    regions, on_grid = rows.shape[-1], k.shape[2] - geometry.prefix
    if geometry.prefix:
        rows = torch.cat([rows, torch.full_like(rows[..., :1], static.regions)], -1)
    first = torch.full((*rows.shape[:2], wide), static.regions + 1, dtype=torch.int32)
    block = torch.cat([first, rows.flatten(2)], -1).flatten()
    of_head = torch.cat([torch.ones(wide, dtype=torch.int64), torch.full((len(static.of),), rows.shape[-1])])
    list_start = torch.cat([torch.zeros(1, dtype=torch.int64), of_head.repeat(rows.shape[0] * rows.shape[1]).cumsum(0)])
    longest = max(static.largest * regions + geometry.prefix, k.shape[2] if wide else 1)
    return TileLists(
        static.query, static.count, list_start, block, static.block_start, static.run, static.bits,
        per_batch=q.shape[1] * len(static.count), per_head=len(static.count), longest=longest,
        listed=int(static.count[:wide].sum()) * k.shape[2]
        + int(static.count[wide:].sum()) * (regions * on_grid // static.regions + geometry.prefix),
    )  # fmt: skip


def _of_tables(tables: Tables, lanes: int) -> TileLists:
    """A tile's list: the blocks of keys that it may touch."""
    queries, keys = queries_and_keys(tables, lanes, BLOCK)
    batch, heads = tables.batch, tables.heads
    hit = touched(tables, queries, keys).expand(batch, heads, queries.count, keys.count)
    order = (queries.tokens == queries.none).to(torch.int8).sort(dim=-1, stable=True).indices
    query = queries.tokens.gather(-1, order)  # holes last
    count = (query != queries.none).sum(-1)
    last = query.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1)).clamp(max=max(queries.none - 1, 0))
    query = torch.where(query == queries.none, last, query)
    block_start, run, lengths = _runs_of(keys.tokens.reshape(-1, BLOCK), keys.none)
    number = torch.arange(keys.count)
    if keys.own:
        number = number + torch.arange(batch * heads).view(batch, heads, 1, 1) * keys.count
    hit = hit & (count > 0).unsqueeze(-1)
    block = number.expand(hit.shape)[hit]
    length = (hit * lengths[number]).sum(-1)
    list_start = torch.cat([torch.zeros(1, dtype=torch.int64), hit.sum(-1).flatten().cumsum(0)])
    return TileLists(
        query.int().contiguous(), count.int().contiguous(), list_start, block.int(), block_start, run,
        torch.empty(0, dtype=torch.int32), per_batch=heads * queries.count, per_head=queries.count,
        longest=max(1, int(length.max())), listed=int((length * count).sum()) // max(batch * heads, 1),
        own_lanes=queries.own,
    )  # fmt: skip


def _runs_of(tokens: Tensor, none: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of keys `[blocks, width]` with holes -> block_start, run, and how many keys each block has."""
    real = tokens != none
    number = torch.arange(len(tokens))[:, None].expand_as(tokens)[real]
    key, lengths = tokens[real], real.sum(-1)
    new = torch.ones_like(key, dtype=torch.bool)
    new[1:] = (key[1:] != key[:-1] + 1) | (number[1:] != number[:-1])
    start = new.nonzero().squeeze(-1)
    count = torch.diff(start, append=torch.tensor([len(key)]))
    runs = torch.bincount(number[start], minlength=len(tokens))
    block_start = torch.cat([torch.zeros(1, dtype=torch.int64), runs.cumsum(0)])
    return block_start, torch.stack([key[start], count, torch.full_like(start, -1)], -1), lengths


@dataclass(frozen=True, eq=False)
class _Regions:
    query: Tensor
    count: Tensor
    of: Tensor
    """The region of each tile on the grid."""
    block_start: Tensor
    run: Tensor
    bits: Tensor
    regions: int
    largest: int


@lru_cache(maxsize=64)
def _region_blocks(x: Selector, route: Regions, geometry: Geometry, queries: int, keys: int, lanes: int) -> _Regions:
    lane_query, count = _lanes(region_tiles(x, route, geometry, queries, lanes), lanes)
    on_grid = torch.arange(geometry.prefix, keys)
    of = region(route, geometry, on_grid)
    total = 1
    for n in region_counts(route, geometry):
        total *= n
    every = -torch.ones(1, dtype=torch.int64)
    sets = [on_grid[of == n] for n in range(total)] + [torch.arange(geometry.prefix), torch.arange(keys)]
    block_start, run, bits, lengths = _joined([(tokens, every.expand(len(tokens))) for tokens in sets], lanes)
    first = lane_query[:, 0]
    return _Regions(
        lane_query.int(), count.int(), region(route, geometry, first[first >= geometry.prefix]),
        block_start, run, bits, total, int(lengths[:total].max()),
    )  # fmt: skip


def region_tiles(x: Selector, route: Regions, geometry: Geometry, queries: int, lanes: int) -> list[Tensor]:
    """The queries of each tile: of one region, or before the grid."""
    tiles: list[Tensor] = []
    for tile in query_tiles(x, geometry, queries, lanes):  # a region may be smaller than a tile
        of = region(route, geometry, tile)
        tiles += [tile[of == n] for n in of.unique().tolist()] if bool(tile[0] >= geometry.prefix) else [tile]
    return tiles


def _lanes(tiles: Sequence[Tensor], lanes: int) -> tuple[Tensor, Tensor]:
    """`[tiles, lanes]` and `[tiles]`."""
    padded = [torch.cat([tile, tile[-1:].expand(lanes - len(tile))]) for tile in tiles]
    return torch.stack(padded), torch.tensor([len(tile) for tile in tiles])


def block_of(
    x: Selector, geometry: Geometry, keys: int, head: int, heads: int, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys a tile may keep, and for each the lanes that may."""
    some = candidates(x, geometry, keys, head, heads, queries)
    zero = torch.zeros((), dtype=torch.int64)
    may = allowed(x, Places(geometry, heads, zero, torch.tensor(head), queries[:, None], some))
    return some_of(some, may.expand(len(queries), len(some)))


def some_of(tokens: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
    """may `[lanes, tokens]`, at most 64 lanes -> tokens of a tile's list, of each one bit a lane; -1: every lane."""
    lanes = len(may)
    bits = (may.long() << torch.arange(lanes)[:, None]).sum(0)
    bits = torch.where(bits == (-1 if lanes == 64 else (1 << lanes) - 1), -1, bits)
    return tokens[bits != 0], bits[bits != 0]


def _joined(blocks: Sequence[tuple[Tensor, Tensor]], lanes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and bits of blocks -> block_start, run, bits, and how many keys each block has."""
    lengths = torch.tensor([len(keys) for keys, _ in blocks])
    key, bits = (torch.cat([block[n] for block in blocks]) for n in range(2))
    number = torch.arange(len(blocks)).repeat_interleave(lengths)
    full = bits == -1
    new = torch.ones_like(full)
    new[1:] = (key[1:] != key[:-1] + 1) | (full[1:] != full[:-1]) | (number[1:] != number[:-1])
    start = new.nonzero().squeeze(-1)
    count = torch.diff(start, append=torch.tensor([len(key)]))
    place = (~full).long().cumsum(0) - 1
    run = torch.stack([key[start], count, torch.where(full[start], -1, place[start])], -1)
    runs = torch.bincount(number[start], minlength=len(blocks))
    block_start = torch.cat([torch.zeros(1, dtype=torch.int64), runs.cumsum(0)])
    partly = bits[~full]
    return block_start, run.contiguous(), torch.where(partly >= 2**31, partly - 2**32, partly).int(), lengths
