"""`keys(...)`, or `keys(...) | prefix`, and the tensors of a call -> lists of tiles: one for each batch item and head.

chosen[b, h]   ->   block b * Hq + h: the runs of the chosen keys, those of the prefix among them
tile x         ->   that block;  of the prefix, the block of every key
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvt_compile.kernels.op.selection import Selection
from kvt_compile.kernels.tiles.lists import MOST, TileLists
from kvt_compile.select.content import tables
from kvt_compile.select.maps import prefix_of
from kvt_compile.select.text import parse
from kvt_compile.select.values import Either, Keys, Prefix, Selector, TopK, split


def shares_keys(select: str) -> bool:
    """Whether a selection is one of these, ranked at most by topk."""
    allowed, rank = split(parse(select))
    ranked = rank is None or (isinstance(rank, TopK) and rank.ties == "all")
    return allowed is not None and ranked and _parts(allowed) is not None


def shared_lists(selection: Selection, q: Tensor, k: Tensor, lanes: int) -> TileLists:
    """The lists of one call for tiles of `lanes` queries: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, on the CPU."""
    assert selection.allowed is not None
    parts = _parts(selection.allowed)
    assert parts is not None
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if max(heads, queries, keys) > MOST:
        raise MemoryError(f"{queries} queries and {keys} keys: lists of so many fit in no memory")
    with torch.device("cpu"):
        table = tables(parts[0], selection.geometry, q, k)[parts[0]]
        wide = min(max((prefix_of(x, selection.geometry) for x in parts[1]), default=0), queries)
        table[..., : max((prefix_of(x, selection.geometry) for x in parts[1]), default=0)] = True
        tiles = [*_tiles(0, wide, lanes), *_tiles(wide, queries, lanes)]
        query = torch.stack([torch.cat([x, x[-1:].expand(lanes - len(x))]) for x in tiles])
        count = torch.tensor([len(x) for x in tiles])
        rows = table.flatten(0, 1)
        block_start, run = _runs(torch.cat([rows, torch.ones_like(rows[:1])]))
        of_prefix = torch.arange(len(tiles)) < -(-wide // lanes)
        own = torch.arange(batch * heads)[:, None].expand(-1, len(tiles))
        block = torch.where(of_prefix, batch * heads, own).flatten()
        lengths = rows.sum(-1)
        return TileLists(
            query.int(), count.int(), torch.arange(len(block) + 1), block.int(), block_start, run,
            torch.empty(0, dtype=torch.int32), per_batch=heads * len(tiles), per_head=len(tiles),
            longest=max(1, keys if wide else 1, int(lengths.max())),
            listed=wide * keys + (queries - wide) * int(lengths.double().mean().round()),
        )  # fmt: skip


def _parts(x: Selector) -> tuple[Keys, list[Prefix]] | None:
    parts = x.parts if isinstance(x, Either) else (x,)
    chosen, rest = [y for y in parts if isinstance(y, Keys)], [y for y in parts if isinstance(y, Prefix)]
    return (chosen[0], rest) if len(chosen) == 1 and len(chosen) + len(rest) == len(parts) else None


def _tiles(start: int, end: int, lanes: int) -> list[Tensor]:
    return list(torch.arange(start, end).split(lanes)) if end > start else []


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """bool `[blocks, Nk]` -> block_start `[blocks + 1]` and run `[runs, 3]`: first key, how many, every lane."""
    edges = torch.diff(rows.to(torch.int8), dim=1, prepend=torch.zeros(len(rows), 1, dtype=torch.int8),
                       append=torch.zeros(len(rows), 1, dtype=torch.int8))  # fmt: skip
    block, first = (edges == 1).nonzero(as_tuple=True)
    last = (edges == -1).nonzero(as_tuple=True)[1]
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(block, minlength=len(rows)).cumsum(0)])
    return start, torch.stack([first, last - first, torch.full_like(first, -1)], -1)
