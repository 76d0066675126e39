"""A tensor -> the same values anywhere in memory, drawn from a `random.Random`."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def strewn(rng: random.Random, x: Tensor, expand: bool = True) -> Tensor:
    """The same values in other places: any order of dimensions, gaps, steps, an offset; with `expand` also dimensions
    that are one row repeated (which changes values, not the shape)."""
    if expand and rng.random() < 0.3 and x.dim() and x.numel():
        for dim in range(x.dim()):
            if rng.random() < 0.4:
                x = x.narrow(dim, 0, 1).expand(x.shape)
    if rng.random() < 0.3:
        return x
    dims = list(range(x.dim()))
    rng.shuffle(dims)
    steps = [rng.choice((1, 1, 2, 3)) for _ in dims]
    gaps = [rng.choice((0, 0, 1, 3)) for _ in dims]
    repeated = [x.stride(d) == 0 and x.shape[d] > 1 for d in range(x.dim())]
    kept = [1 if repeated[d] else x.shape[d] for d in range(x.dim())]
    strides, reach = [0] * x.dim(), 1
    for d in dims:
        strides[d] = 0 if repeated[d] else reach * steps[d]
        reach *= max(1, kept[d] * steps[d] + gaps[d])
    offset = rng.choice((0, 0, 1, 5))
    place = torch.zeros(offset + reach + 1, dtype=x.dtype)
    view = place.as_strided(x.shape, strides, offset)
    if x.numel():
        source = x.as_strided(kept, x.stride(), x.storage_offset())
        place.as_strided(kept, strides, offset).copy_(source)
    return view
