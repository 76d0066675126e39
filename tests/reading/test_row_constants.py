"""What is taken of a row and subtracted: dropped where that changes nothing, kept where floats forget the rest."""

from __future__ import annotations

import pytest
import torch
from rewritten import FAR, MASK, N, Scores, Weighed, outcome
from torch import Tensor

FAR_ROWS = torch.arange(N)[:, None] * 1e8


def mean(s: Tensor) -> Tensor:
    return s.mean(-1, keepdim=True)


def least(s: Tensor) -> Tensor:
    return s.amin(-1, keepdim=True)


def largest(s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True)


def largest_of_all(s: Tensor) -> Tensor:
    return s.amax((-1, -2), keepdim=True)


def less(of: Scores, taken: Scores) -> Scores:
    def scores(s: Tensor) -> Tensor:
        s = of(s)
        return s - taken(s)

    return scores


def bare(s: Tensor) -> Tensor:
    return s


def masked(s: Tensor) -> Tensor:
    return s.masked_fill(MASK, torch.finfo(s.dtype).min / 100)


DROPPED: dict[str, Scores] = {
    "the largest": less(bare, largest),
    "the largest of masked scores": less(masked, largest),
    "the largest of scores far apart": less(lambda s: s + FAR, largest),
    "the largest of rows far apart": less(lambda s: s + FAR_ROWS / 1e8, largest),
    "the largest, scaled afterwards": lambda s: less(lambda s: s + FAR, largest)(s) * 0.5,
    "the largest in another shape": less(bare, lambda s: s.max(-1).values[..., None]),
    "the largest, in float64 and back": less(bare, lambda s: s.double().amax(-1, True).float()),
    "the logarithm of the sum": less(masked, lambda s: s.logsumexp(-1, keepdim=True)),
    "the largest of all bare scores": less(bare, lambda s: s.max()),
    "the largest of all scaled scores": less(lambda s: s * 0.125, largest_of_all),
    "the largest of all masked scores": less(masked, lambda s: s.max().detach()),
    "the largest of all scores, all in one dimension": less(bare, lambda s: s.flatten(1).amax(-1)[:, None, None]),
    "the largest before the mask": lambda s: masked(s) - largest(s),
    "the mean of bare scores": less(bare, mean),
    "the mean of scores times a number, detached": less(lambda s: -s / 3, lambda s: mean(s).detach()),
    "the least of bare scores": less(bare, least),
}
KEPT: dict[str, Scores] = {
    "the mean of masked scores": less(masked, mean),
    "the mean of scores far apart": less(lambda s: s + FAR, mean),
    "the mean of masked scores, detached": less(masked, lambda s: mean(s).detach()),
    "half of what the mean leaves": lambda s: less(masked, mean)(s) * 0.5,
    "the least of masked scores": less(masked, least),
    "the least of scores far apart": less(lambda s: s + FAR, least),
    "the sum of masked scores": less(masked, lambda s: s.sum(-1, keepdim=True)),
    "the largest of rows far apart": less(lambda s: s + FAR_ROWS, lambda s: s.max()),
    "the largest of rows far apart, in two dimensions": less(lambda s: s + FAR_ROWS, largest_of_all),
    "the largest of scores masked with a large number": less(lambda s: s.masked_fill(MASK, 1e9), lambda s: s.max()),
    "the largest of another row": less(lambda s: s + FAR_ROWS, lambda s: largest(s)[:, N - 1 :]),
    "the largest of larger scores": lambda s: s - (s * 1e8).amax(-1, True).detach(),
    "the sum of larger scores": lambda s: s - (s * 1e8).logsumexp(-1, True).detach(),
    "the largest of scores without a bias": lambda s: s + FAR.cos() - (s - FAR).amax(-1, True).detach(),
    "the largest of scores before a cap": lambda s: (s / 1e7).tanh() - (s * 1e4).amax(-1, True).detach(),
}


def rewarded(of: Scores, reward: Scores) -> Scores:
    def scores(s: Tensor) -> Tensor:
        s = of(s)
        return s + reward(s)

    return scores


COMPARED: dict[str, Scores] = {
    "with the largest less": rewarded(less(bare, largest), lambda u: 2 * (u > -1)),
    "in a where": rewarded(less(bare, largest), lambda u: torch.where(u > -1, 2.0, 0.0)),
    "with nothing": rewarded(less(bare, largest), lambda u: torch.where(u == 0, 5.0, 0.0)),
    "with the mean less": rewarded(less(bare, mean), lambda u: torch.where(u < -1, -3.0, MASK.float())),
    "as a factor": rewarded(less(bare, largest), lambda u: MASK.float() * (u > -1)),
    "logarithms of weights": rewarded(lambda s: s.log_softmax(-1), lambda u: (u > -2).float()),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped(name: str) -> None:
    assert outcome(Weighed(lambda s: DROPPED[name](s).softmax(-1))).startswith("fused")


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert outcome(Weighed(lambda s: KEPT[name](s).softmax(-1))) == "scores-kept"


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_is_not_dropped(name: str) -> None:
    """Where the scores are compared with numbers it matters what was taken from them."""
    assert outcome(Weighed(lambda s: COMPARED[name](s).softmax(-1))) == "scores-kept"
