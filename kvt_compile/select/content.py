"""q, k -> what is chosen by content: the only part of a selection that reads tensors.

    regions  A[r, s] = (mean of q over region r) . (mean of k over region s), added over the heads that choose together;
             or the largest softmax weight between tokens of both, of the heads' mean q and mean k
             chosen[r] = the `keep` regions s with the largest A[r, s], the smaller s first among equals
    keys     the k keys with the largest |k_j|, or (mean of q) . k_j
    heads    of each query the `keep` heads with the largest |q_h|

Computed in float64 whatever the inputs' type: every lowering chooses the same, the backward as the forward.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from kvt_compile.select.geometry import Geometry, groups_of_heads
from kvt_compile.select.maps import region, region_counts
from kvt_compile.select.values import Heads, Keys, Regions, Selector, leaves, per_axis
from kvt_compile.topk import as_fraction

ELEMENTS = 1 << 22
"""Scores of tokens that are held at a time."""


def tables(x: Selector, geometry: Geometry, q: Tensor, k: Tensor) -> dict[Selector, Tensor]:
    """Of every selector that chooses by content, bool: of regions `[B, Hq, query regions, key regions]`, of keys
    `[B, Hq, Nk]`, of heads `[B, Hq, Nq]`."""
    found: dict[Selector, Tensor] = {}
    for part in leaves(x):
        if isinstance(part, Keys):
            best = best_keys(part, q, k)
            found[part] = torch.zeros((*q.shape[:2], k.shape[2]), dtype=torch.bool, device=q.device).scatter_(
                -1, best, True
            )
        if isinstance(part, Heads):
            length = q.detach().double().norm(dim=-1)
            best = _best(length, part.keep, 1)
            found[part] = torch.zeros_like(length, dtype=torch.bool).scatter_(1, best, True)
        if isinstance(part, Regions):
            best = chosen(part, geometry, q, k)
            table = torch.zeros((*best.shape[:3], best.shape[2]), dtype=torch.bool, device=q.device)
            table.scatter_(-1, best, True)
            found[part] = table.repeat_interleave(q.shape[1] // table.shape[1], 1)
    return found


@torch.no_grad()
def chosen(x: Regions, geometry: Geometry, q: Tensor, k: Tensor) -> Tensor:
    """q `[B, Hq, N, D]`, k `[B, Hk, N, D]` -> `[B, groups of heads, regions, keep]` int64, best first."""
    groups = groups_of_heads(x, q.shape[1])
    products = (_mean_products if x.by == "mean" else _largest_weights)(x, geometry, q, k, groups)
    best: Tensor = _best(products, x.keep, -1)
    return best


@torch.no_grad()
def best_keys(x: Keys, q: Tensor, k: Tensor) -> Tensor:
    """q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]` -> `[B, Hq, k]` int64, best first."""
    shared = q.shape[1] // max(k.shape[1], 1)
    if x.by == "norm":
        return _best(k.double().norm(dim=-1), x.k, -1).repeat_interleave(shared, 1)
    mean = q.double().sum(2, keepdim=True) / max(q.shape[2], 1)
    return _best((mean @ k.double().repeat_interleave(shared, 1).transpose(-1, -2)).squeeze(2), x.k, -1)


def _best(score: Tensor, keep: int | float, dim: int) -> Tensor:
    """The places of the largest along a dimension, best first, the smaller place first among equals."""
    order: Tensor = score.sort(dim=dim, descending=True, stable=True).indices
    return order.narrow(dim, 0, how_many(keep, score.shape[dim]))


def how_many(keep: int | float, of: int) -> int:
    """A number, or a share of so many, at least 1."""
    kept = math.ceil(Fraction(*as_fraction(keep)) * of) if isinstance(keep, float) else keep
    return max(min(1, of), min(kept, of))


def _mean_products(x: Regions, geometry: Geometry, q: Tensor, k: Tensor, groups: int) -> Tensor:
    """`[B, groups, regions, regions]`"""
    heads = q.shape[1]
    of_q, of_k = means(x, geometry, q), means(x, geometry, k)
    products: Tensor = of_q @ of_k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
    together: Tensor = products.unflatten(1, (groups, heads // groups)).sum(2)
    return together


def _largest_weights(x: Regions, geometry: Geometry, q: Tensor, k: Tensor, groups: int) -> Tensor:
    """`[B, groups, regions, regions]`: softmax weights of sampled tokens, the largest of each pair of regions; the
    weights of a few queries at a time."""
    token, of = _sampled(x, geometry, q.device)
    heads, regions = q.shape[1], math.prod(region_counts(x, geometry))
    mine = q.double().unflatten(1, (groups, heads // groups)).mean(2)[:, :, token]
    theirs = k.double().repeat_interleave(heads // k.shape[1], 1).unflatten(1, (groups, heads // groups)).mean(2)
    theirs = theirs[:, :, token].transpose(-1, -2)
    found = torch.zeros((*mine.shape[:2], regions, regions), dtype=torch.float64, device=q.device)
    step = max(1, ELEMENTS // max(mine.shape[0] * groups * len(token), 1))
    for part in range(0, len(token), step):
        weights = (mine[:, :, part : part + step] @ theirs * q.shape[-1] ** -0.5).softmax(-1)
        pooled = torch.zeros((*weights.shape[:3], regions), dtype=torch.float64, device=q.device)
        pooled.scatter_reduce_(3, of.expand_as(weights), weights, "amax")
        rows = of[part : part + step, None].expand_as(pooled)
        found.scatter_reduce_(2, rows, pooled, "amax")
    return found


def _sampled(x: Regions, geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first of every `stride` tokens of each region, row by row within it, and their regions."""
    token = torch.arange(geometry.prefix, geometry.tokens, device=device)
    of = region(x, geometry, token)
    order = of.sort(stable=True).indices
    counts = torch.bincount(of)
    place = torch.arange(len(token), device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    order = order[place % x.stride == 0]
    return token[order], of[order]


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
