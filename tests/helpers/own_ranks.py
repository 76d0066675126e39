"""More models that select by themselves (see own_selections.py): by places, quantiles, gathered keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from own_selections import DV, INF, NK, NQ, B, H, K, Module, other, own, scores
from torch import Tensor

# ---- places and quantiles --------------------------------------------------------------------------------------------


@own()
def by_place(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    place = t.argsort(-1, descending=True).argsort(-1)
    return t.masked_fill(place >= K, -INF).softmax(-1) @ v


@own()
def by_place_from_the_smallest(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    place = t.sort(-1).indices.argsort(-1)
    return torch.where(place > NK - K - 1, t, -INF).softmax(-1) @ v


@own()
def by_place_of_the_negative(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    place = torch.argsort(torch.argsort(-t, dim=-1), dim=-1)
    return torch.where(place <= K - 1, t, -INF).softmax(-1) @ v


@other("does not keep its score")
def by_place_of_the_smallest(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t.argsort(-1).argsort(-1) >= K, -INF).softmax(-1) @ v


@other("does not decide about single keys")
def by_positions_of_the_ranking(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t.argsort(-1, descending=True) >= K, -INF).softmax(-1) @ v


@other("every key, or none")
def by_a_place_beyond_the_last(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t.argsort(-1, descending=True).argsort(-1) >= NK, -INF).softmax(-1) @ v


@own()
def by_a_quantile(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.quantile(0.65, dim=-1, keepdim=True), -INF).softmax(-1) @ v  # 6.5 of 0 .. 10


@own(k=5)
def by_a_quantile_that_is_a_score(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t >= t.quantile(0.6, -1, True), t, -INF).softmax(-1) @ v


@own()
def above_a_quantile_between_scores(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t > t.detach().quantile(0.65, -1).unsqueeze(-1), t, -INF).softmax(-1) @ v


@own(k=5)
def by_the_score_below_a_quantile(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t >= torch.quantile(t, 0.65, -1, True, interpolation="lower"), t, -INF).softmax(-1) @ v


@own(k=6)
def by_the_median(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.median(-1, keepdim=True).values, -INF).softmax(-1) @ v


@other("the k-th itself")
def above_a_quantile_that_is_a_score(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t > t.quantile(0.6, -1, True), t, -INF).softmax(-1) @ v


@other("all but is one of them")
def by_a_quantile_next_to_a_score(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t >= t.quantile(0.60001, -1, True), t, -INF).softmax(-1) @ v


@other("no number where keys are masked")
def by_a_quantile_of_masked_scores(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k).masked_fill(m.p("hidden", NK) > 2.0, -INF)
    return torch.where(t >= t.quantile(0.65, -1, True), t, -INF).softmax(-1) @ v


# ---- a temperature ---------------------------------------------------------------------------------------------------


@own(score="")
def a_temperature_of_each_head(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = (q @ k.mT).topk(K)
    scale = m.p("scale", H, 1, 1).clamp(max=4.6).exp()
    return torch.zeros(B, H, NQ, NK, dtype=q.dtype).scatter(-1, index, (values * scale).softmax(-1)) @ v


@own(score="")
def selected_without_the_temperature(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q @ k.mT
    kept = torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.topk(K).indices, True)
    return (t * F.softplus(m.p("scale", H, 1, 1))).masked_fill(~kept, -INF).softmax(-1) @ v


@other("")
def a_temperature_that_may_be_negative(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = (q @ k.mT).topk(K)
    weights = (values * m.p("scale", H, 1, 1)).softmax(-1)
    return torch.zeros(B, H, NQ, NK, dtype=q.dtype).scatter(-1, index, weights) @ v


@other("other scores")
def a_temperature_of_each_key(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q @ k.mT
    kept = torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.topk(K).indices, True)
    return (t * m.p("scale", NK).exp()).masked_fill(~kept, -INF).softmax(-1) @ v


# ---- the largest weights, normalised again -----------------------------------------------------------------------


@own()
def largest_weights_over_their_sum(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    values, index = w.topk(K)
    return torch.zeros_like(w).scatter(-1, index, values / values.sum(-1, keepdim=True)) @ v


@own()
def largest_weights_over_their_sum_times_gathered(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).softmax(-1).topk(K)
    chosen = v[:, :, None].expand(B, H, NQ, NK, DV).gather(3, index[..., None].expand(B, H, NQ, K, DV))
    return ((values / values.sum(-1, keepdim=True))[..., None] * chosen).sum(-2)


@other("not normalised again")
def largest_weights_as_they_are(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    values, index = w.topk(K)
    return torch.zeros_like(w).scatter(-1, index, values) @ v


@other("not normalised again")
def largest_weights_over_a_little_more_than_their_sum(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    values, index = w.topk(K)
    return torch.zeros_like(w).scatter(-1, index, values / (values.sum(-1, keepdim=True) + 1e-3)) @ v


# ---- gathered by several tensors of positions ----------------------------------------------------------------------


def axes(*sizes: int) -> list[Tensor]:
    """arange along every axis of a result with two more behind."""
    return [torch.arange(size).view(-1, *(1,) * (len(sizes) + 1 - d)) for d, size in enumerate(sizes)]


@own()
def indexed_values(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).topk(K)
    b, h = axes(B, H)
    return torch.einsum("bhim,bhimd->bhid", values.softmax(-1), v[b, h, index])


@own()
def indexed_values_of_folded_heads(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    values, index = scores(q, k).topk(K)
    chosen = v[torch.arange(B * H)[:, None, None], index]
    return (values.softmax(-1).unsqueeze(2) @ chosen).squeeze(2).view(B, H, NQ, DV)


@other("not gathered in a way that is understood")
def values_of_other_heads(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).topk(K)
    b, h = axes(B, H)
    return torch.einsum("bhim,bhimd->bhid", values.softmax(-1), v[b, (h + 1) % H, index])


@other("not gathered in a way that is understood")
def values_of_the_second_batch(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).topk(K)
    b, h = axes(B, H)
    return torch.einsum("bhim,bhimd->bhid", values.softmax(-1), v[torch.ones_like(b), h, index])


# ---- scores computed again of gathered keys ------------------------------------------------------------------------


def at(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, NK, D] at [B, H, NQ, K] -> [B, H, NQ, K, D]."""
    size = x.shape[-1]
    many = x[:, :, None].expand(B, H, NQ, NK, size)
    return many.gather(3, index[..., None].expand(B, H, NQ, index.shape[-1], size))


@own()
def scores_of_gathered_keys(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = scores(q, k).topk(K).indices
    t = torch.einsum("bhid,bhimd->bhim", q, at(k, index)) * 0.5
    return torch.einsum("bhim,bhimd->bhid", t.softmax(-1), at(v, index))


@own()
def scores_of_indexed_keys(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = axes(B, H)
    with torch.no_grad():
        index = (q @ k.mT).topk(K).indices
    t = q.unsqueeze(3) @ k[b, h, index].mT * 0.5
    return (t.softmax(-1) @ v[b, h, index]).squeeze(3)


@own()
def scores_of_gathered_keys_summed(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.softmax((q * 0.5) @ k.mT, -1).topk(K).indices
    t = (q.unsqueeze(3) * at(k, index)).sum(-1) / 2.0
    return (t.softmax(-1).unsqueeze(-1) * at(v, index)).sum(-2)


# ---- a few queries at a time ---------------------------------------------------------------------------------------


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Memory-efficient top-k attention: three queries at a time, the top weights written among zeros."""
    out = []
    for part in q.split(3, dim=2):
        t = scores(part, k)
        values, index = t.topk(K, dim=-1)
        out.append(torch.zeros_like(t).scatter(-1, index, values.softmax(-1)) @ v)
    return torch.cat(out, dim=2)
