"""Selections by a function of the scores: the order is the same in real numbers, and in floats not always."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from own_kept import K, own_ks
from rewritten import FAR, MASK
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


def less(function: Function, of: Function = lambda s: s) -> Function:
    return lambda s: of(s) - function(of(s))


def mean(s: Tensor) -> Tensor:
    return s.mean(-1, keepdim=True)


def largest(s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True)


class Attention(nn.Module):
    """Keeps keys by `order`, a function of the scores, and weighs them by `scores`, another one."""

    def __init__(self, order: Function, scores: Function = lambda s: s) -> None:
        super().__init__()
        self.order, self.scores = order, scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kept(q @ k.mT).softmax(-1) @ v


class Compared(Attention):
    def kept(self, s: Tensor) -> Tensor:
        order = self.order(s)
        return self.scores(s).masked_fill(order < order.topk(K, -1).values[..., -1:], -torch.inf)


class Scattered(Attention):
    def kept(self, s: Tensor) -> Tensor:
        index = self.order(s).topk(K, -1).indices
        return torch.full_like(s, -torch.inf).scatter(-1, index, self.scores(s).gather(-1, index))


class Threshold(Attention):
    """Compares the scores themselves with the k-th largest of their function."""

    def kept(self, s: Tensor) -> Tensor:
        return self.scores(s).masked_fill(s < self.order(s).topk(K, -1).values[..., -1:], -torch.inf)


SAME: dict[str, tuple[Function, ...]] = {
    "scaled": (lambda s: s * 0.125,),
    "divided": (lambda s: s / 8,),
    "without the largest": (less(largest),),
    "without the mean": (less(mean),),
    "softmax": (lambda s: s.softmax(-1),),
    "softmax of cooler scores": (lambda s: (s * 0.5).softmax(-1),),
    "softmax of both, scaled": (lambda s: (s * 2).softmax(-1), lambda s: s * 2),
    "in float64": (lambda s: s.double(),),
}
FORGOTTEN: dict[str, tuple[Function, ...]] = {
    "a large number": (lambda s: s + 1e9,),
    "a large number less": (lambda s: s - 1e9,),
    "without the mean of masked scores": (less(mean, lambda s: s.masked_fill(MASK, -1e30)),),
    "without the sum": (less(lambda s: (s + FAR).sum(-1, keepdim=True)),),
    "without the largest of larger ones": (less(lambda s: largest(s - FAR)),),
    "softmax of hotter scores": (lambda s: (s * 100).softmax(-1),),
    "softmax, and cooler scores": (lambda s: s.softmax(-1), lambda s: s * 0.01),
    "scaled to nothing": (lambda s: s * 1e-44,),
    "divided to nothing": (lambda s: s / 1e44 / 1e3,),
    "scaled to infinity": (lambda s: s * 1e38 * 1e10,),
}


@pytest.mark.parametrize("way", [Compared, Scattered])
@pytest.mark.parametrize("name", SAME)
def test_the_same_order(way: type[Attention], name: str) -> None:
    assert own_ks(way(*SAME[name])) == ["4"]


@pytest.mark.parametrize("way", [Compared, Scattered])
@pytest.mark.parametrize("name", FORGOTTEN)
def test_an_order_that_floats_forget(way: type[Attention], name: str) -> None:
    assert own_ks(way(*FORGOTTEN[name])) == []


OTHERS: dict[str, Function] = {
    "doubled": lambda s: s * 2,
    "without the largest": less(largest),
    "softmax": lambda s: s.softmax(-1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_threshold_is_of_the_very_scores(name: str) -> None:
    assert own_ks(Threshold(OTHERS[name])) == []


def test_a_threshold_of_the_scores() -> None:
    assert own_ks(Threshold(lambda s: s.detach().clone())) == ["4"]
