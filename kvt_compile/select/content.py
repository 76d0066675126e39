"""q, k -> which key regions each query region keeps (`regions`): the only part of a selection that reads tensors.

    A[r, s] = (mean of q over region r) . (mean of k over region s), added over the heads that choose together
    chosen[r] = the `keep` regions s with the largest A[r, s], the smaller s first among equals

Computed in float64 whatever the inputs' type: every lowering chooses the same regions, the backward the forward's.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import region_counts
from kvt_compile.select.values import Regions, SelectionError, Selector, leaves, per_axis
from kvt_compile.topk import as_fraction


def tables(x: Selector, geometry: Geometry, q: Tensor, k: Tensor) -> dict[Selector, Tensor]:
    """Of every selector that chooses by content: bool `[B, Hq, query regions, key regions]`."""
    found: dict[Selector, Tensor] = {}
    for part in leaves(x):
        if isinstance(part, Regions):
            best = chosen(part, geometry, q, k)
            table = torch.zeros((*best.shape[:3], best.shape[2]), dtype=torch.bool, device=q.device)
            table.scatter_(-1, best, True)
            found[part] = table.repeat_interleave(q.shape[1] // table.shape[1], 1)
    return found


@torch.no_grad()
def chosen(x: Regions, geometry: Geometry, q: Tensor, k: Tensor) -> Tensor:
    """q `[B, Hq, N, D]`, k `[B, Hk, N, D]` -> `[B, groups of heads, regions, keep]` int64, best first."""
    heads = q.shape[1]
    groups = {"each": heads, "all": 1}.get(x.heads, x.heads) if isinstance(x.heads, str) else x.heads
    assert isinstance(groups, int)
    if heads % groups:
        raise SelectionError(f"{x}: {heads} heads do not divide into {groups} groups")
    of_q, of_k = means(x, geometry, q), means(x, geometry, k)
    products = of_q @ of_k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
    products = products.unflatten(1, (groups, heads // groups)).sum(2)
    regions = products.shape[-1]
    order: Tensor = products.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : kept_regions(x, regions)]


def kept_regions(x: Regions, regions: int) -> int:
    """How many of so many regions are kept, at least 1."""
    kept = math.ceil(Fraction(*as_fraction(x.keep)) * regions) if isinstance(x.keep, float) else x.keep
    return max(1, min(kept, regions))


def means(x: Regions, geometry: Geometry, tensor: Tensor) -> Tensor:
    """`[B, H, N, D]` -> `[B, H, regions, D]` float64: the mean over each region's tokens."""
    sizes, counts = per_axis(x.size, len(geometry.grid)), region_counts(x, geometry)
    on_grid = tensor[:, :, geometry.prefix :].unflatten(2, geometry.grid)
    margins = [n * size - have for n, size, have in zip(counts, sizes, geometry.grid, strict=True)]
    if any(margins):
        on_grid = F.pad(on_grid, (0, 0, *(y for margin in reversed(margins) for y in (0, margin))))
    shape = [n for pair in zip(counts, sizes, strict=True) for n in pair]
    total = on_grid.reshape(*on_grid.shape[:2], *shape, on_grid.shape[-1]).double()
    for n in range(len(counts)):  # one axis after the other: a third of the time of all at once
        total = total.sum(3 + n)
    tokens = torch.ones((), dtype=torch.float64, device=tensor.device)
    for n, size, have in zip(counts, sizes, geometry.grid, strict=True):
        along = torch.full((n,), size, dtype=torch.float64, device=tensor.device)
        along[-1] = have - (n - 1) * size
        tokens = tokens.unsqueeze(-1) * along
    mean: Tensor = total / tokens.unsqueeze(-1)
    return mean.flatten(2, 1 + len(counts))
