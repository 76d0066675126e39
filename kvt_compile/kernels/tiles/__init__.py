"""A selection -> lists of tiles: for each tile of queries the keys to compute, so that cost follows what is kept.

order       queries -> tiles        keys    a tile -> the keys it may keep, a superset, found without looking at all
lists       both -> the arrays a C kernel reads, kept for each shape; what tensors choose is made anew in each call
walks       lists for a GPU's kernels, and turned round: tiles of keys with lists of queries
conditions  what tensors choose -> a condition of the score over small tables
touched     those tables -> which tiles of queries and keys may touch
placed      what geometry decides, on a device
"""

from __future__ import annotations

from kvt_compile.kernels.tiles.conditions import check_conditioned, conditioned, tables_of, with_tables
from kvt_compile.kernels.tiles.lists import TileLists, refusal, tile_lists
from kvt_compile.kernels.tiles.walks import LANES, Walk, Walks

__all__ = [
    "LANES",
    "TileLists",
    "Walk",
    "Walks",
    "check_conditioned",
    "conditioned",
    "refusal",
    "tables_of",
    "tile_lists",
    "with_tables",
]
