"""A call on a rank's part -> numbers that are the same on every rank where what should be a part is none.

keys of a text that every rank has whole      each of them would be counted as often as there are ranks
0, 1, 2, ... that a model counted itself      positions in the part, not in the sequence
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.parallel import coordinates


def content_of_keys(call: AttentionCall) -> int:
    """A number that other keys hardly have; 0 where nothing can be told.  As many keys as rows are self-attention, of a
    trial in which every rank has the same data."""
    return 0 if call.q.shape[2] == call.keys else _content(call.k, 2)


def counted_slots(call: AttentionCall) -> list[int]:
    """Captured tensors that may be places of tokens, or be made of places: what lies along rows or keys."""
    texts = call.spec.score, call.spec.weight
    slots = range(len(call.captured))
    return [slot for slot in slots if any(coordinates.dimension_of(texts, slot, axis) is not None for axis in "ij")]


def content_of_places(call: AttentionCall, slot: int) -> int:
    """A number that other places hardly have; 0 for what neither rises nor falls along the tokens."""
    texts, x = (call.spec.score, call.spec.weight), call.captured[slot]
    for axis in "ij":
        dim = coordinates.dimension_of(texts, slot, axis)
        if dim is not None and _is_monotonic(x, dim):
            return _content(x, dim)
    return 0


def _is_monotonic(x: Tensor, dim: int) -> bool:
    steps = x.detach().double().diff(dim=dim)
    return bool((steps >= 0).all()) or bool((steps <= 0).all())


def _content(x: Tensor, dim: int) -> int:
    """0 where all along the dimension are alike, or something is not finite."""
    x = x.detach().double()
    if bool((x == x.narrow(dim, 0, min(1, x.shape[dim]))).all()):
        return 0
    summed = (x * torch.arange(1, x.numel() + 1, device=x.device).view(x.shape)).sum()
    return int(summed.view(torch.int64).item()) if summed.isfinite() else 0
