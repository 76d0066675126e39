"""Ways to normalise a row of scores: what is a softmax, whatever it is written as, and what only looks like one.

@softmax(of=lambda m, s: s * math.log(3.0))          (the scores that it is the softmax of, for the oracle)
def base_three(m, s, v): e = 3.0**s;  return e / e.sum(-1, keepdim=True) @ v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from spellings import B, D, H, N
from torch import Tensor, nn

Function = Callable[[Any, Tensor, Tensor], Tensor]
Scores = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Normaliser:
    id: str
    function: Function
    of: Scores | None = None
    """What it is the softmax of; None where it is none."""
    score: str | None = None
    """The text of the score program, captured tensors as c0, c1, ...; None where it is not stable."""
    factor: float = 1.0
    says: str = ""
    """Of what is no softmax: a part of the reason, which has the formula in it."""
    thinned: bool = False
    """Of what is no softmax: whether its numerator keeps the k largest of a row."""


TABLE: dict[str, Normaliser] = {}
_LOG = "where(eq(x, 0.0), -oo, log(where(eq(x, 0.0), 1.0, x)))"
"""The logarithm of a numerator that may be 0, with no gradient where it is."""


def softmax(of: Scores = lambda m, s: s, score: str | None = "s", factor: float = 1.0) -> Callable[[Function], Any]:
    def register(function: Function) -> Function:
        TABLE[function.__name__] = Normaliser(function.__name__, function, of, score, factor)
        return function

    return register


def none(says: str = "", thinned: bool = False) -> Callable[[Function], Any]:
    def register(function: Function) -> Function:
        TABLE[function.__name__] = Normaliser(function.__name__, function, says=says, thinned=thinned)
        return function

    return register


class Normalised(nn.Module):
    """One of them between two products of its inputs [B, H, N, D]."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.shift = nn.Parameter(torch.randn(N, 1))
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.gain = nn.Parameter(torch.randn(N))
        self.register_buffer("mask", (torch.rand(N, N) < 0.6) | torch.eye(N).bool())
        self.register_buffer("weights", torch.rand(N, N))
        self.topk = N

    def pick(self, e: Tensor) -> Tensor:
        """The numerator; for the oracle, 0 but for its k largest of each row."""
        if self.topk == N:
            return e
        return e.masked_fill(e < e.detach().topk(self.topk, -1).values[..., -1:], 0.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(self, q @ k.mT, v)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(B, H, N, D, dtype=dtype, requires_grad=True) for _ in range(3)]


def _masked(m: Any, s: Tensor) -> Tensor:
    return s.masked_fill(~m.mask, -torch.inf)


# ---- normalised before the product -----------------------------------------------------------------------------------


@softmax()
def exponential_over_its_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum(-1, keepdim=True) @ v


@softmax()
def exponential_written_twice(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.exp() / torch.exp(s).sum(-1)[..., None] @ v


@softmax()
def logarithm_of_a_softmax(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(s, -1).exp() @ v


@softmax()
def softmax_of_a_logarithm_of_one(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.log_softmax(-1).softmax(-1) @ v


@softmax()
def there_and_back(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1).log().exp() @ v


@softmax()
def minus_its_log_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return (s - torch.logsumexp(s, -1, keepdim=True)).exp() @ v


@softmax()
def minus_the_log_of_its_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return (s - s.exp().sum(-1, True).log()).exp() @ v


@softmax()
def smallest(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return F.softmin(-s, -1) @ v


@softmax()
def normalised_by_name(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return F.normalize(s.exp(), p=1, dim=-1) @ v


@softmax()
def over_its_norm(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / torch.linalg.vector_norm(e, 1, -1, True) @ v


@softmax(score=None)
def base_two(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(s * math.log2(math.e))
    return e / e.sum(-1, keepdim=True) @ v


@softmax(lambda m, s: s * math.log(3.0), score=f"{math.log(3.0)}*s")
def base_three(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = 3.0**s
    return e / e.sum(-1, keepdim=True) @ v


@softmax()
def base_e(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = torch.pow(math.e, s)
    return e / e.sum(-1, keepdim=True) @ v


@softmax()
def less_one_and_one(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return (torch.expm1(s) + 1) / (torch.expm1(s).sum(-1, True) + N) @ v


@softmax()
def odds(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.sigmoid() / (1 - s.sigmoid())
    return e / e.sum(-1, True) @ v


@softmax()
def hyperbolic(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = torch.cosh(s) + torch.sinh(s)
    return e / e.sum(-1, True) @ v


@softmax()
def half_squared(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s / 2).exp() ** 2
    return e * e.sum(-1, True).reciprocal() @ v


@softmax()
def times_one_over(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e * (1 / e.sum(-1, True)) @ v


@softmax()
def summed_in_double(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return (e / e.sum(-1, True, dtype=torch.float64)).to(v.dtype) @ v


@softmax()
def mean_times_count(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / (e.mean(-1, True) * N) @ v


@softmax(factor=N)
def over_the_mean(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / e.mean(-1, True) @ v


@softmax()
def turned_around(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.mT.exp()
    return (e / e.sum(-2, True)).mT @ v


# ---- something subtracted from the row -------------------------------------------------------------------------------


@softmax()
def minus_the_largest(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.amax(-1, True)).exp()
    return e / e.sum(-1, True) @ v


@softmax()
def minus_the_detached_largest(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.max(-1, keepdim=True).values.detach()).exp()
    return e / e.sum(-1, True) @ v


@softmax()
def minus_the_mean(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.mean(-1, True)).exp()
    return e / e.sum(-1, True) @ v


@softmax(lambda m, s: s - m.shift, score="s - c0[i, 0]")
def minus_a_parameter(m: Any, s: Tensor, v: Tensor) -> Tensor:
    """Its gradient is nothing, and there is one."""
    e = (s - m.shift).exp()
    return e / e.sum(-1, True) @ v


@softmax()
def a_sum_that_is_never_small(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.amax(-1, True)).exp()
    return e / e.sum(-1, True).clamp(min=1e-6) @ v


# ---- masks and factors -----------------------------------------------------------------------------------------------


@softmax(_masked, score="where(c0[i, j], s, -oo)")
def times_a_mask(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp() * m.mask
    return e / e.sum(-1, True) @ v


@softmax(_masked, score="where(c0[i, j], s, -oo)")
def times_a_mask_in_the_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e, mask = s.exp(), m.mask.to(v.dtype)
    return (e * mask) / (e * mask).sum(-1)[..., None] @ v


@softmax(_masked, score="where(c0[i, j], s, -oo)")
def chosen_or_nothing(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = torch.where(m.mask, s.exp(), 0.0)
    return e / e.sum(-1, True) @ v


@softmax(_masked, score=None)
def masked_and_normalised_again(m: Any, s: Tensor, v: Tensor) -> Tensor:
    weights = s.softmax(-1) * m.mask
    return weights / weights.sum(-1, True) @ v


@softmax(lambda m, s: s + m.gain, score="s + c0[j]")
def weighted_and_normalised_again(m: Any, s: Tensor, v: Tensor) -> Tensor:
    weights = s.softmax(-1) * m.gain.exp()
    return weights / weights.sum(-1, True) @ v


@softmax(lambda m, s: s + m.bias, score="s + c0[h, i, j]")
def times_an_exponential(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp() * m.bias.exp()
    return e / e.sum(-1, True) @ v


@softmax(lambda m, s: s + m.gain.sigmoid().log(), score="s + c0[j]")
def gated_and_normalised_again(m: Any, s: Tensor, v: Tensor) -> Tensor:
    """The logarithm of the gate stands nowhere in the model."""
    weights = s.softmax(-1) * m.gain.sigmoid()
    return weights / weights.sum(-1, True) @ v


@softmax(lambda m, s: s + m.gain.sigmoid().log()[:, None], score=None)
def rows_gated(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.gain.sigmoid()[:, None] * s.exp()
    return e / e.sum(-1, True) @ v


@softmax(lambda m, s: s.relu().log(), score="log(relu(s))")
def rectified(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.relu() + 0.0
    return e / e.sum(-1, True) @ v


@softmax(lambda m, s: s.square().log(), score=_LOG.replace("x", "s**2"))
def squared(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s**2
    return e / e.sum(-1, True) @ v


@softmax(lambda m, s: s.sigmoid().log(), score=_LOG.replace("x", "sigmoid(s)"))
def logistic(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.sigmoid()
    return e / e.sum(-1, True) @ v


# ---- normalised after the product ------------------------------------------------------------------------------------


@softmax()
def divided_afterwards(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return (e @ v) / e.sum(-1, keepdim=True)


@softmax()
def times_a_reciprocal_afterwards(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = (s - s.amax(-1, True)).exp()
    return (e @ v) * (1 / e.sum(-1)).unsqueeze(-1)


@softmax(_masked, score="where(c0[i, j], s, -oo)")
def masked_and_divided_afterwards(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp().masked_fill(~m.mask, 0)
    return (e @ v) / e.sum(-1, True)


@softmax()
def summed_by_a_product(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e @ v / (e @ torch.ones_like(v[..., :1]))


@softmax()
def summed_by_a_column_of_ones(m: Any, s: Tensor, v: Tensor) -> Tensor:
    out = s.exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return out[..., :-1] / out[..., -1:]


@softmax()
def by_einsum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return torch.einsum("bhij,bhjd->bhid", e, v) / torch.einsum("bhij->bhi", e)[..., None]


@softmax()
def heads_behind_tokens(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return ((e @ v).transpose(1, 2) / e.sum(-1).transpose(1, 2)[..., None]).transpose(1, 2)


@softmax()
def heads_in_the_batch(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp().flatten(0, 1)
    return (torch.bmm(e, v.flatten(0, 1)) / e.sum(-1, True)).view(B, H, N, D)


@softmax()
def three_factors_in_one_einsum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return torch.einsum("bhij,bhi,bhjd->bhid", e, e.sum(-1).reciprocal(), v)


@softmax()
def an_einsum_that_sums_nothing(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return torch.einsum("bhij,bhi->bhij", e, 1 / e.sum(-1)) @ v


@softmax()
def root_of_the_squared_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp().pow(1.0)
    return e * torch.rsqrt(e.sum(-1, True) ** 2) @ v


@softmax()
def minus_a_log_sum_by_hand(m: Any, s: Tensor, v: Tensor) -> Tensor:
    largest = s.amax(-1, True)
    return (s - (largest + (s - largest).exp().sum(-1, True).log())).exp() @ v


@softmax(lambda m, s: s * math.log(2.0), score=None)
def a_tensor_to_the_power(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = torch.tensor(2.0, dtype=v.dtype) ** s
    return e / e.sum(-1, True) @ v


# ---- rows without a key ----------------------------------------------------------------------------------------------


@softmax(_masked, score=None)
def safe_as_core_aten_spells_it(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.masked_fill(~m.mask, -torch.inf)
    weights = s.softmax(-1)
    dead = torch.logical_not(torch.logical_not(s == -torch.inf).any(-1, keepdim=True))
    return torch.where(dead, torch.full_like(weights, 0), weights) @ v


@softmax(_masked, score=None)
def safe_by_all(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.masked_fill(~m.mask, -torch.inf)
    return s.softmax(-1).masked_fill((s == -torch.inf).all(-1, True), 0.0) @ v


@softmax(_masked, score=None)
def safe_by_the_largest(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.masked_fill(~m.mask, -torch.inf)
    return torch.where(s.amax(-1, True) > -torch.inf, s.softmax(-1), 0.0) @ v


# ---- no softmax ------------------------------------------------------------------------------------------------------


@none("exp(s) / (1 + sum(exp(s)))", thinned=True)
def one_more(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e / (1 + e.sum(-1, True)) @ v


@none("/ (exp(-amax(s)) + sum(", thinned=True)
def one_more_with_the_largest_subtracted(m: Any, s: Tensor, v: Tensor) -> Tensor:
    largest = s.amax(-1, True)
    e = m.pick((s - largest).exp())
    return e / ((-largest).exp() + e.sum(-1, True)) @ v


@none("exp(s) / (sum(exp(s)) + 1e-06)", thinned=True)
def a_little_more(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e / (e.sum(-1, True) + 1e-6) @ v


@none("(exp(s) @ v) / (sum(exp(s)) + 1e-06)", thinned=True)
def a_little_more_afterwards(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e @ v / (e.sum(-1, True) + 1e-6)


@none("relu(s) / (sum(relu(s)) + 1e-06)", thinned=True)
def rectified_and_a_little_more(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.relu())
    return e / (e.sum(-1, True) + 1e-6) @ v


@none("square(relu(s))", thinned=True)
def squares_over_their_mean_and_more(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.relu().square())
    return (e @ v) / (e.mean(-1, True) + 0.1)


@none("exp(s) / clamp(sum(exp(s)), 0.001, inf)", thinned=True)
def a_sum_with_a_floor(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e / e.sum(-1, True).clamp(min=1e-3) @ v


@none("1.5, inf", thinned=True)
def a_floor_above_the_smallest_sum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick((s - s.amax(-1, True)).exp())
    return e / e.sum(-1, True).clamp(min=1.5) @ v


@none("exp(s) / detach(sum(exp(s)))", thinned=True)
def the_sum_is_detached(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e / e.sum(-1, True).detach() @ v


@none("exp(s) / sqrt(sum(square(exp(s))))", thinned=True)
def over_the_root_of_squares(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = m.pick(s.exp())
    return e / e.square().sum(-1, True).sqrt() @ v


@none("exp(s - detach(logsumexp(s)))")
def the_log_sum_is_detached(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return (s - s.logsumexp(-1, True).detach()).exp() @ v


@none("exp(s) / sum(exp(2 * s))")
def the_sum_of_something_else(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.exp() / (2 * s).exp().sum(-1, True) @ v


@none("over 2 axes")
def the_sum_of_all(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum((-1, -2), True) @ v


@none("exp(s + 1e+09 - 1e+09) / sum(exp(s))")
def rounded_away(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return ((s + 1e9) - 1e9).exp() / s.exp().sum(-1, True) @ v


@none("exp(s) / norm(exp(s))")
def over_another_norm(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e / e.norm(dim=-1, keepdim=True) @ v


@none("(exp(s) @ v) / sum(exp(s))")
def half_of_the_keys(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return e[..., :3] @ v[:, :, :3] / e.sum(-1, True)


@none("exp(s) * weights / sum(exp(s) * weights)")
def times_weights_that_may_be_negative(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp() * m.weights
    return e / e.sum(-1, True) @ v


@none("exp(s) / (1 + sum(exp(s)))")
def one_more_and_the_scores_again(m: Any, s: Tensor, v: Tensor) -> Tensor:
    e = s.exp()
    return (e / (1 + e.sum(-1, True)) * s.tanh()) @ v


@none("nothing that is understood normalises its rows")
def not_normalised(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.sigmoid() @ v


@none("relu(s) / 5")
def divided_by_the_count(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.relu() / N @ v


@none("stands s:")
def as_it_is(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s @ v
