"""(seed, b, h, i, j) -> keep or drop: Philox4x32-10, so that every lowering draws the same mask and can draw it again.

    counter = (lo32(o), hi32(o), 0, 0),  o = first + b*per_b + h*per_h + i*per_i + j,  key = (lo32(seed), hi32(seed))
    dropped  <=>  first output word < floor(dropout_p * 2**32)

A call that is all there is has first = 0, per_b = Hq*Nq*Nk, per_h = Nq*Nk, per_i = Nk.  One that is a part of a larger
call (some of its batch, heads or queries, with all keys) has those four numbers of the larger one, and so its mask.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def place_of_draws(rows: Sequence[int], keys: int, part: Sequence[int] | None = None) -> tuple[int, int, int, int]:
    """(first, per_b, per_h, per_i) of a call with `[B, Hq, Nq]` rows; `part` itself where it is given."""
    if part is not None:
        first, per_b, per_h, per_i = part
        return first, per_b, per_h, per_i
    _, heads, queries = rows
    return 0, heads * queries * keys, queries * keys, keys


def philox_first_word(offset: Tensor, seed: Tensor) -> Tensor:
    """First output word, in [0, 2**32), as int64.  offset: int64, any shape; seed: int64, one element, same device."""
    seed = seed.reshape(())
    # 32-bit words in int64: a product wraps like uint64 does, and >> with a mask takes its upper word exactly
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    x0, x1 = offset & _LOW, (offset >> 32) & _LOW
    x2 = x3 = torch.zeros((), dtype=torch.int64, device=offset.device)
    for _ in range(10):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = ((product1 >> 32) & _LOW) ^ x1 ^ key0, product1 & _LOW
        x2, x3 = ((product0 >> 32) & _LOW) ^ x3 ^ key1, product0 & _LOW
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return x0


def dropped(offset: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """bool, shaped like `offset`: True where the weight becomes zero."""
    return philox_first_word(offset, seed) < int(dropout_p * 2**32)


def keep_scale(dropout_p: float) -> float:
    """What kept weights are multiplied by: 1 / (1 - p); with p = 1 nothing is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
