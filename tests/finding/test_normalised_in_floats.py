"""Rows that algebra calls a softmax, and floats do not: what is rounded away, floors, sums in whole numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewritten import MASK, N, Scores, Weighed, inputs, outcome
from torch import Tensor, nn


def over_its_sum(e: Tensor) -> Tensor:
    return e / e.sum(-1, True)


# ---- softmaxes written out, of scores that something was taken from --------------------------------------------------

WRITTEN: dict[str, Scores] = {
    "exponentials over their sum": lambda u: over_its_sum((u - u.amax(-1, True)).exp()),
    "the largest detached": lambda u: over_its_sum((u - u.amax(-1, True).detach()).exp()),
    "minus the logarithm of the sum": lambda u: (u - u.logsumexp(-1, True)).exp(),
    "a logarithm of a softmax": lambda u: u.log_softmax(-1).exp(),
}
TAKEN: dict[str, Scores] = {
    "mean": lambda u: u.mean(-1, True),
    "least": lambda u: u.amin(-1, True),
    "least, as the largest of minus": lambda u: -(-u).amax(-1, True),
    "largest size": lambda u: u.abs().amax(-1, True),
    "sum": lambda u: u.sum(-1, True),
    "mean of all": lambda u: u.mean((-1, -2), True),
}


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize("written", WRITTEN)
def test_what_forgets_the_scores_is_not_dropped(written: str, taken: str) -> None:
    def weights(s: Tensor) -> Tensor:
        u = s.masked_fill(MASK, -1e30)
        return WRITTEN[written](u - TAKEN[taken](u))

    assert not outcome(Weighed(weights)).startswith("fused")


@pytest.mark.parametrize("written", [name for name in WRITTEN if not name.startswith("minus")])
def test_a_large_multiple_is_not_dropped(written: str) -> None:
    module = Weighed(lambda s: WRITTEN[written](s + 1e9 * s.mean(-1, True).detach()))
    assert not outcome(module).startswith("fused")


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", ["largest", "mean of bare scores"])
def test_what_is_of_the_scores_size_is_dropped(written: str, name: str) -> None:
    def weights(s: Tensor) -> Tensor:
        if name == "largest":
            s = s.masked_fill(MASK, -1e30)
            return WRITTEN[written](s - s.amax(-1, True))
        return WRITTEN[written](s - s.mean(-1, True))

    assert outcome(Weighed(weights)).startswith("fused")


# ---- sums that are not the numerator's -------------------------------------------------------------------------------

SOFTMAXES: dict[str, Scores] = {
    "normalised by name": lambda s: F.normalize(s.exp(), p=1, dim=-1),
    "normalised by name, from a softmax": lambda s: F.normalize(s.softmax(-1), p=1, dim=-1, eps=0.5),
    "a floor under a sum of at least 1": lambda s: (lambda e: e / e.sum(-1, True).clamp(min=1))(
        (s - s.amax(-1, True)).exp()
    ),
    "one less and one more": lambda s: over_its_sum(s.exp() - 1 + 1),
    "a number less than 1 there and back": lambda s: over_its_sum(s.exp() + 0.5 - 0.5),
    "a tiny power": lambda s: over_its_sum((s * 1e13).mul(1e-13).exp() * s.exp()),
    "a scale written twice": lambda s: over_its_sum((s / 3 - (s / 3).amax(-1, True)).exp()),
    "summed in float64": lambda s: (s.exp() / s.exp().sum(-1, True, dtype=torch.float64)).float(),
}
OTHERS: dict[str, Scores] = {
    "a floor by name": lambda s: F.normalize(s.exp(), p=1, dim=-1, eps=100.0),
    "a small floor by name": lambda s: F.normalize((-((s - 6) ** 2)).exp(), p=1, dim=-1, eps=1e-6),
    "a floor by name under masked weights": lambda s: F.normalize(s.softmax(-1) * MASK, p=1, dim=-1, eps=0.5),
    "a floor by name under ReLU": lambda s: F.normalize((s - 2).relu(), p=1, dim=-1, eps=0.5),
    "a floor, less another row's largest": lambda s: (lambda e: e / e.sum(-1, True).clamp(min=1))(
        (s - s.amax(-1, True)[:, 7:8]).exp()
    ),
    "a floor, less the first row's largest": lambda s: (lambda e: e / e.sum(-1, True).clamp(min=1.0))(
        (s - s.amax(-1, True)[:, :1]).exp()
    ),
    "a tiny number more": lambda s: (lambda e: e / (e.sum(-1, True) + 1e-12))((-((s - 8) ** 2)).exp()),
    "a tinier number more": lambda s: (lambda e: e / (e.sum(-1, True) + 1e-13))((s - 40).exp()),
    "one over a tiny number more": lambda s: (lambda e: e * (e.sum(-1, True) + 1e-12).reciprocal())((s - 40).exp()),
    "a tiny number in each": lambda s: over_its_sum((s - 3).relu() + 1e-20),
    "a large number there and back": lambda s: over_its_sum(s.exp() + 1e6 - 1e6),
    "five there and back": lambda s: over_its_sum((s - 8).exp() + 5 - 5),
    "exponentials the other way": lambda s: over_its_sum((s - 8).sinh() + (s - 8).cosh()),
    "the elements of a tensor there and back": lambda s: over_its_sum((s.exp() + BIG) - BIG),
}
BIG = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) * 1e6


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax(name: str) -> None:
    assert outcome(Weighed(SOFTMAXES[name])).startswith("fused")


@pytest.mark.parametrize("name", OTHERS)
def test_no_softmax(name: str) -> None:
    tolerance = 1e-1 if "back" in name or "other way" in name else 1e-4
    assert not outcome(Weighed(OTHERS[name]), tolerance=tolerance).startswith("fused")


WHOLE: dict[str, Scores] = {
    "int64": lambda s: s.exp() / s.exp().sum(-1, True, dtype=torch.int64),
    "int32": lambda s: s.exp() / s.exp().sum(-1, True, dtype=torch.int32),
    "of a softmax": lambda s: s.softmax(-1) / (1 + s.softmax(-1).sum(-1, True, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_sum_in_whole_numbers(name: str) -> None:
    tensors = [x.detach() for x in inputs()]
    outcome(Weighed(WHOLE[name]), tensors)
    if name != "of a softmax":
        assert not outcome(Weighed(WHOLE[name]), tensors).startswith("fused")


@pytest.mark.parametrize("factors", [(2.0**-148, 2.0**50, 2.0**98), (2.0**-130, 2.0**130), (2.0**126, 2.0**-126)])
def test_factors_that_leave_nothing_stay(factors: tuple[float, ...]) -> None:
    def weights(s: Tensor) -> Tensor:
        for x in factors:
            s = s * x
        return s.softmax(-1)

    outcome(Weighed(weights), [x.detach() for x in inputs()])


class Scaled(nn.Module):
    def __init__(self, q: float, k: float, back: tuple[float, ...]) -> None:
        super().__init__()
        self.q, self.k, self.back = q, k, back

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * self.q) @ (k * self.k).mT
        for x in self.back:
            scores = scores * x
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "factors", [(2.0**-148, 2.0**100, (2.0**48,)), (2.0**-75, 2.0**-75, (2.0**75, 2.0**75)), (0.25, 2.0, (0.5,))]
)
def test_queries_scaled_to_nothing_are_not_scaled_back(factors: tuple[float, float, tuple[float, ...]]) -> None:
    assert outcome(Scaled(*factors), [x.detach() for x in inputs()]).startswith("fused")
