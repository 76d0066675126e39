"""A selection -> lists of tiles: for each tile of queries the keys to compute, so that cost follows what is kept.

order   queries -> tiles            keys    a tile -> the keys it may keep, a superset, found without looking at all
lists   both -> the arrays a kernel reads, kept for each shape; those of `regions` made anew in each call
shared  the same of `keys`, which every query of a head shares
"""

from __future__ import annotations

from kvt_compile.kernels.tiles.lists import TileLists, refusal, tile_lists
from kvt_compile.kernels.tiles.shared import shared_lists, shares_keys

__all__ = ["TileLists", "refusal", "shared_lists", "shares_keys", "tile_lists"]
