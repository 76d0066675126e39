"""What is taken of a row and subtracted: dropped where that changes nothing, kept where floats forget the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

N, D = 16, 8
GENERATOR = torch.Generator().manual_seed(0)
MASK = (torch.rand(N, N, generator=GENERATOR) < 0.4) & ~torch.eye(N).bool()
FAR = torch.where(MASK, -1e30, 0.0)
Scores = Callable[[Tensor], Tensor]


def mean(s: Tensor) -> Tensor:
    return s.mean(-1, keepdim=True)


def least(s: Tensor) -> Tensor:
    return s.amin(-1, keepdim=True)


def largest(s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True)


def less(of: Scores, taken: Scores) -> Scores:
    def scores(s: Tensor) -> Tensor:
        s = of(s)
        return s - taken(s)

    return scores


def masked(s: Tensor) -> Tensor:
    return s.masked_fill(MASK, torch.finfo(s.dtype).min / 100)


DROPPED: dict[str, Scores] = {
    "the largest": less(lambda s: s, largest),
    "the largest of masked scores": less(masked, largest),
    "the largest of scores far apart": less(lambda s: s + FAR, largest),
    "the logarithm of the sum": less(masked, lambda s: s.logsumexp(-1, keepdim=True)),
    "the mean of bare scores": less(lambda s: s, mean),
    "the mean of scores times a number, detached": less(lambda s: -s / 3, lambda s: mean(s).detach()),
    "the least of bare scores": less(lambda s: s, least),
}
KEPT: dict[str, Scores] = {
    "the mean of masked scores": less(masked, mean),
    "the mean of scores far apart": less(lambda s: s + FAR, mean),
    "the mean of masked scores, detached": less(masked, lambda s: mean(s).detach()),
    "half of what the mean leaves": lambda s: less(masked, mean)(s) * 0.5,
    "the least of masked scores": less(masked, least),
    "the least of scores far apart": less(lambda s: s + FAR, least),
    "the sum of masked scores": less(masked, lambda s: s.sum(-1, keepdim=True)),
}


class Attention(nn.Module):
    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scores(q @ k.mT).softmax(-1) @ v


def outcome(scores: Scores) -> str:
    """How its site was rewritten, which changed no number and no gradient."""
    tensors = [torch.randn(2, N, D, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in range(3)]
    module = Attention(scores)
    rewritten = kvt_compile.rewrite(module, *tensors, topk=1.0, force_rewrite=True)
    out, expected = rewritten.module(*tensors), module(*tensors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (site,) = rewritten.report.sites
    return site.outcome


@pytest.mark.parametrize("name", DROPPED)
def test_dropped(name: str) -> None:
    assert outcome(DROPPED[name]).startswith("fused")


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert outcome(KEPT[name]) == "scores-kept"
