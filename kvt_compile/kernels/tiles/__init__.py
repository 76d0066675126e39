"""A selection -> lists of tiles: for each tile of queries the keys to compute, so that cost follows what is kept.

order   queries -> tiles            keys    a tile -> the keys it may keep, a superset, found without looking at all
lists   both -> the arrays a C kernel reads, kept for each shape; those of `regions` made anew in each call
shared  the same of `keys`, which every query of a head shares
walks   lists for a GPU's kernels, and turned round: tiles of keys with lists of queries
"""

from __future__ import annotations

from kvt_compile.kernels.tiles.lists import TileLists, by_content, refusal, tile_lists
from kvt_compile.kernels.tiles.shared import shared_lists, shares_keys
from kvt_compile.kernels.tiles.walks import LANES, Walk, Walks

__all__ = [
    "LANES",
    "TileLists",
    "Walk",
    "Walks",
    "by_content",
    "refusal",
    "shared_lists",
    "shares_keys",
    "tile_lists",
]
