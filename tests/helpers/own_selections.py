"""Models that select keys by themselves, one function each, and neighbours that do something else.

    @own(k=4)                         k-NN attention with k = 4: fused, with outputs and gradients as they are
    @other("the k-th itself")         not k-NN attention: nothing is selected on top, and the reason says why

Each is given (m, q [B, H, Nq, D], k [B, H, Nk, D], v [B, H, Nk, Dv]), all sizes different, with m for parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, H, NQ, NK, D, DV = 2, 3, 7, 11, 4, 5
K = 4
INF = float("inf")


@dataclass(frozen=True)
class Selecting:
    """One function; `k` is the own k that must be read, None where it must not."""

    name: str
    forward: Callable[..., Tensor]
    k: int | None = K
    reason: str = ""
    score: str = ""
    step: str = "selection"

    def __str__(self) -> str:
        return self.name

    def build(self) -> Module:
        torch.manual_seed(0)
        module = Module(self)
        with torch.no_grad():
            module(*tensors())
        return module.double()


class Module(nn.Module):
    def __init__(self, case: Selecting) -> None:
        super().__init__()
        self.case = case

    def p(self, name: str, *shape: int) -> Tensor:
        """A parameter, random."""
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        found: Tensor = getattr(self, name)
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.case.forward(self, q, k, v)


def tensors(*, keys: int = NK) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (B, H, NQ, D), (B, H, keys, D), (B, H, keys, DV)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


OWN: list[Selecting] = []
OTHERS: list[Selecting] = []


def own(k: int = K, score: str = "0.5*s") -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OWN.append(Selecting(function.__name__, function, k, score=score))
        return function

    return add


def other(reason: str, step: str = "selection") -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OTHERS.append(Selecting(function.__name__, function, None, reason, step=step))
        return function

    return add


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


# ---- a mask is scattered ---------------------------------------------------------------------------------------------


@own()
def official(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros(B, H, NQ, NK, device=t.device, requires_grad=False)
    index = torch.topk(t, k=K, dim=-1, largest=True)[1]
    mask.scatter_(-1, index, 1.0)
    t = torch.where(mask > 0, t, torch.full_like(t, float("-inf")))
    return torch.softmax(t, dim=-1) @ v


@own()
def boolean_scatter(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    kept = torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.topk(K).indices, True)
    return t.masked_fill(~kept, -INF).softmax(-1) @ v


@own()
def dropped_are_scattered(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    dropped = torch.ones_like(t, dtype=torch.bool)
    dropped.scatter_(3, t.topk(K)[1], False)
    return t.masked_fill_(dropped, -INF).softmax(-1) @ v


@own()
def values_scattered_into_minus_infinity(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K, dim=-1)
    return torch.full_like(t, -INF).scatter(-1, index, values).softmax(-1) @ v


@own()
def gathered_scores_scattered(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    index = t.detach().topk(K, dim=-1).indices
    return torch.full_like(t, -INF).scatter_(-1, index, t.gather(-1, index)).softmax(-1) @ v


@own()
def additive_mask(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return (t + torch.full_like(t, -INF).scatter(-1, t.topk(K)[1], 0.0)).softmax(-1) @ v


@own()
def logarithm_of_the_mask(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return (t + torch.zeros_like(t).scatter(-1, t.topk(K)[1], 1.0).log()).softmax(-1) @ v


@own()
def far_below_without_masks(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return (t + (1.0 - mask) * -1e9).softmax(-1) @ v


@own(score="s")
def scaled_after_the_selection(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q @ k.mT * 0.5
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return (torch.where(mask.bool(), t, -INF) / 0.5).softmax(-1) @ v


@own()
def selected_by_unscaled_scores(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raw = q @ k.mT
    kept = torch.zeros_like(raw).scatter(-1, raw.topk(K)[1], 1.0) == 1
    return torch.where(kept, raw * 0.5, -INF).softmax(-1) @ v


@own()
def selected_by_weights(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    kept = torch.zeros_like(t).scatter(-1, t.softmax(-1).topk(K)[1], 1.0) != 0
    return t.masked_fill(kept.logical_not(), -INF).softmax(-1) @ v


@own()
def folded_heads(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k).reshape(B * H, NQ, NK)
    mask = torch.zeros_like(t).scatter_(2, t.topk(K)[1], 1.0)
    t = torch.where(mask > 0.5, t, -INF).view(B, H, NQ, NK)
    return t.softmax(-1) @ v


@own()
def keys_first(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = torch.einsum("bhid,bhjd->bhji", q, k) * 0.5
    kept = torch.zeros_like(t, dtype=torch.bool).scatter(2, t.topk(K, dim=2)[1], True)
    w = t.masked_fill(~kept, -INF).softmax(2)
    return torch.einsum("bhji,bhjd->bhid", w, v)


@own(score="c0[h, i, j] + 0.5*s")
def with_a_bias(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k) + m.p("bias", H, NQ, NK)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@own(score="")
def masked_before_the_selection(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k).masked_fill(torch.ones(NQ, NK, dtype=torch.bool).triu(3), -INF)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@own()
def without_grad(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    with torch.no_grad():
        mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@own()
def by_sort(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    index = t.sort(-1, descending=True)[1][..., :K]
    return torch.where(torch.zeros_like(t).scatter(-1, index, 1.0) > 0, t, -INF).softmax(-1) @ v


@own()
def by_argsort(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    index = t.argsort(dim=-1)[..., -K:]
    return torch.where(torch.zeros_like(t).scatter(-1, index, 1.0) > 0, t, -INF).softmax(-1) @ v


# ---- a threshold -----------------------------------------------------------------------------------------------------


@own()
def last_of_topk(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.topk(K).values[..., -1:], -INF).softmax(-1) @ v


@own()
def last_of_topk_as_in_explicit_sparse_transformer(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    top, _ = torch.topk(t, k=min(K, t.size(-1)), dim=-1)
    smallest = top[..., -1].unsqueeze(-1).expand_as(t)
    mask = torch.lt(t, smallest)
    return t.masked_fill_(mask, float("-inf")).softmax(-1) @ v


@own()
def last_of_topk_none(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t >= t.topk(K)[0][..., -1, None], t, -INF).softmax(-1) @ v


@own()
def least_of_topk(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t.topk(K, sorted=False)[0].min(-1, keepdim=True)[0] <= t, t, -INF).softmax(-1) @ v


@own()
def amin_of_topk(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t - t.topk(K)[0].amin(-1, keepdim=True) >= 0, t, -INF).softmax(-1) @ v


@own()
def kth_value(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.kthvalue(NK - K + 1, dim=-1, keepdim=True)[0], -INF).softmax(-1) @ v


@own()
def kth_value_without_keepdim(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(~(t >= t.kthvalue(NK - K + 1).values.unsqueeze(-1)), -INF).softmax(-1) @ v


@own()
def sorted_descending(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.sort(dim=-1, descending=True)[0][..., K - 1 : K], -INF).softmax(-1) @ v


@own()
def sorted_ascending(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < torch.sort(t)[0][..., -K].unsqueeze(-1), -INF).softmax(-1) @ v


@own()
def threshold_of_detached_scores(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    threshold = t.detach().topk(K).values[..., -1:]
    t[t < threshold] = -INF
    return t.softmax(-1) @ v


@own(k=1)
def the_largest_alone(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.topk(K)[0][..., :1], -INF).softmax(-1) @ v


# ---- neighbours ------------------------------------------------------------------------------------------------------


@other("not along the axis of the softmax")
def over_the_queries(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-2, t.topk(K, dim=-2)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@other("smallest")
def the_smallest(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K, largest=False)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@other("smallest")
def below_the_threshold_of_the_smallest(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t >= t.topk(K, largest=False)[0][..., -1:], t, -INF).softmax(-1) @ v


@other("other scores")
def by_another_score(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, (t * m.p("factors", NK)).topk(K)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@other("other scores")
def by_a_negative_multiple(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, (t * -1.0).topk(K)[1], 1.0)
    return torch.where(mask > 0, t, -INF).softmax(-1) @ v


@other("does not keep its score")
def the_selected_are_dropped(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    return torch.where(mask > 0, -INF, t).softmax(-1) @ v


@other("not their scores")
def other_values_are_scattered(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K)
    return torch.full_like(t, -INF).scatter(-1, index, values * 2.0).softmax(-1) @ v


@other("not their scores")
def detached_values_are_scattered(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K)
    return torch.full_like(t, -INF).scatter(-1, index, values.detach()).softmax(-1) @ v


@other("the k-th itself")
def above_the_kth(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.where(t > t.topk(K)[0][..., -1:], t, -INF).softmax(-1) @ v


@other("the k-th itself")
def up_to_the_kth_is_masked(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t <= t.topk(K)[0][..., -1:], -INF).softmax(-1) @ v


@other("decides about its weights")
def weights_are_dropped_by_scores(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return (t.softmax(-1) * torch.zeros_like(t).scatter(-1, t.topk(K)[1], 1.0)) @ v


@other("not normalised again")
def weights_are_not_normalised_again(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return (w * torch.zeros_like(w).scatter(-1, w.topk(K)[1], 1.0)) @ v


@other("something else of selected scores")
def zero_for_the_others(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return (t * torch.zeros_like(t).scatter(-1, t.topk(K)[1], 1.0)).softmax(-1) @ v


@other("not nothing")
def a_little_below(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return t.masked_fill(t < t.topk(K)[0][..., -1:], -10.0).softmax(-1) @ v


@other("whose keys are all masked")
def far_below_with_a_mask(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(NQ)[:, None] <= torch.arange(NK)[None]
    mask[0] = False
    t = scores(q, k).masked_fill(~mask, -1e9)
    return t.masked_fill(t < t.topk(K)[0][..., -1:], -1e9).softmax(-1) @ v


@other("something else of selected scores")
def masked_after_the_selection(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1], 1.0)
    t = torch.where(mask > 0, t, -INF)
    return t.masked_fill(torch.ones(NQ, NK, dtype=torch.bool).triu(NK - 2), -INF).softmax(-1) @ v


@other("other scores")
def masked_between(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raw = scores(q, k)
    t = raw.masked_fill(torch.ones(NQ, NK, dtype=torch.bool).triu(NK - 2), -INF)
    return torch.where(raw >= raw.topk(K)[0][..., -1:], t, -INF).softmax(-1) @ v


@other("several selections")
def two_selections(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    first = torch.zeros_like(t).scatter(-1, t.topk(K)[1], 1.0)
    second = torch.zeros_like(t).scatter(-1, t.topk(2)[1], 1.0)
    return torch.where(first - second > 0, t, -INF).softmax(-1) @ v


@other("")
def threshold_along_the_wrong_axis(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q @ k[..., :NQ, :].mT
    return t.masked_fill(t < t.topk(K)[0][..., -1].unsqueeze(-2), -INF).softmax(-1) @ v[..., :NQ, :]


@other("part of the queries")
def for_some_queries(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    mask = torch.zeros_like(t).scatter_(-1, t.topk(K)[1][:, :, : NQ - 1], 1.0)
    return torch.where(mask > 0, t, -1e30).softmax(-1) @ v


@other("")
def k_of_each_head(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    ordered = t.sort(-1, descending=True)[0]
    at = torch.tensor([2, 3, 5]).view(1, H, 1, 1).expand(B, H, NQ, 1) - 1
    return t.masked_fill(t < ordered.gather(-1, at), -INF).softmax(-1) @ v


@other("")
def by_rank(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    rank = t.argsort(-1, descending=True).argsort(-1)
    return t.masked_fill(rank > m.p("n", 1, H, 1, 1).abs() * 3, -INF).softmax(-1) @ v


# ---- the top values alone --------------------------------------------------------------------------------------------


@own()
def weights_scattered_into_zeros(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K, dim=-1)
    return torch.zeros_like(t).scatter_(-1, index, values.softmax(-1)) @ v


@own()
def gathered_by_einsum(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).topk(K, dim=-1)
    many = v.unsqueeze(2).expand(B, H, NQ, NK, DV)
    chosen = many.gather(3, index.unsqueeze(-1).expand(B, H, NQ, K, DV))
    return torch.einsum("bhim,bhimd->bhid", values.softmax(-1), chosen)


@own(score="s")
def gathered_by_a_product(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    top = torch.topk(q @ k.mT * 0.5, K)
    weights = torch.softmax(top.values / 0.5, dim=-1)
    many = v[:, :, None].expand(-1, -1, NQ, -1, -1)
    chosen = torch.gather(many, 3, top.indices[..., None].expand(-1, -1, -1, -1, DV))
    return (weights.unsqueeze(-2) @ chosen).squeeze(-2)


@own()
def gathered_and_summed(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values, index = scores(q, k).topk(K)
    many = v.unsqueeze(2).expand(B, H, NQ, NK, DV)
    chosen = torch.take_along_dim(many, index.unsqueeze(-1).expand(B, H, NQ, K, DV), 3)
    return (values.softmax(-1).unsqueeze(-1) * chosen).sum(-2)


@other("combined with other keys")
def gathered_at_other_positions(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K)[0], (t * 2.0).topk(K)[1].flip(-1)
    many = v.unsqueeze(2).expand(B, H, NQ, NK, DV)
    chosen = many.gather(3, index.unsqueeze(-1).expand(B, H, NQ, K, DV))
    return torch.einsum("bhim,bhimd->bhid", values.softmax(-1), chosen)


@other("others than zeros")
def weights_scattered_into_a_map(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K, dim=-1)
    return torch.ones_like(t).scatter_(-1, index, values.softmax(-1)) @ v


@other("smallest")
def weights_of_the_smallest(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K, dim=-1, largest=False)
    return torch.zeros_like(t).scatter_(-1, index, values.softmax(-1)) @ v


@other("")
def weights_times_a_negative_number(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    values, index = t.topk(K, dim=-1)
    return torch.zeros_like(t).scatter_(-1, index, (values * -1.0).softmax(-1)) @ v


@own()
def weights_normalised_again(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    w = w * torch.zeros_like(w).scatter(-1, w.topk(K)[1], 1.0)
    return (w / w.sum(-1, keepdim=True)) @ v


@other("", step="weights")
def rows_of_another_kind(m: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    e = t.relu() * torch.zeros_like(t).scatter(-1, t.topk(K)[1], 1.0)
    return (e / (1.0 + e.sum(-1, keepdim=True))) @ v
