"""Which tokens a rank has: one run of them, or two from both ends, so that causal attention is the same work for all.

contiguous, 4 ranks    0 0 1 1 2 2 3 3        balanced    0 1 2 3 3 2 1 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["contiguous", "balanced"]


@dataclass(frozen=True)
class Part:
    """Tokens `local` .. `local + count - 1` of a rank are tokens `first` ... of the sequence."""

    local: int
    first: int
    count: int


def parts(order: Order, rank: int, ranks: int, count: int) -> tuple[Part, ...]:
    """The runs of a rank that has `count` tokens.  Raises ValueError for an odd number in the balanced order."""
    if order == "contiguous":
        return (Part(0, rank * count, count),)
    if count % 2:
        raise ValueError(
            f"a rank has {count} tokens, expected an even number: the balanced order gives it two runs of one length; "
            f"pad the sequence to a multiple of {2 * ranks} or use order='contiguous'"
        )
    half = count // 2
    return Part(0, rank * half, half), Part(half, (2 * ranks - 1 - rank) * half, half)


def split(x: Tensor, dim: int, order: Order, ranks: int) -> list[Tensor]:
    """The whole sequence -> what each rank has.  Raises ValueError where it cannot be cut into equal parts."""
    pieces = ranks * (2 if order == "balanced" else 1)
    if x.shape[dim] % pieces:
        raise ValueError(
            f"dimension {dim} has size {x.shape[dim]}, expected a multiple of {pieces}: {ranks} ranks, {order} order"
        )
    chunks = x.chunk(pieces, dim)
    if order == "contiguous":
        return list(chunks)
    return [torch.cat([chunks[rank], chunks[pieces - 1 - rank]], dim) for rank in range(ranks)]


def join(shards: Sequence[Tensor], dim: int, order: Order) -> Tensor:
    """What each rank has -> the whole sequence."""
    if order == "contiguous":
        return torch.cat(list(shards), dim)
    halves = [x.chunk(2, dim) for x in shards]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], dim)
