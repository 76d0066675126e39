"""Factors of the scores on the way of what selects, and of what is weighed: they may be as far from 1 as floats bear
together, and 0 never; what an own k left out is no order; a row's maximum is the row's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from own_kept import INF, K, Model, N, Weights, keep, least, of_scores, own_ks, tensors, top
from test_own_whole_rows import at, renormalised, weighed
from torch import Tensor, nn


def by_order(order: Weights) -> Weights:
    """Keeps keys by the k-th of a function of the scores."""
    return lambda s: keep(s, (t := order(s)) >= least(t)).softmax(-1)


def of_values(change: Weights) -> Model:
    """The top values alone, changed."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values, index = (q @ k.mT).topk(K)
        return weighed(change(values).softmax(-1), at(v, index))

    return model


def again(ranked: Weights = lambda s: s, keys: Weights = lambda k: k, after: Weights = lambda t: t) -> Model:
    """Scores of the gathered keys; they were ranked by those of changed keys."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = ranked(q @ keys(k).mT).topk(K).indices
        return weighed(after(torch.einsum("bhid,bhimd->bhim", q, at(k, index))).softmax(-1), at(v, index))

    return model


def thrice(number: float) -> Weights:
    return lambda s: s * number * number * number


FORGOTTEN: dict[str, Model] = {
    "shifted far": of_scores(lambda s: (keep(s, s >= least(s)) + 1e9).softmax(-1)),
    "shifted far down": of_scores(lambda s: (keep(s, s >= least(s)) - 1e9).softmax(-1)),
    "tiny, then shifted": of_scores(lambda s: (keep(t := s * 1e-8, t >= least(t)) + 1.0).softmax(-1)),
    "an order scaled to nothing": of_scores(by_order(thrice(1e-18))),
    "an order scaled to infinity": of_scores(by_order(thrice(1e18))),
    "scores scaled to nothing": of_scores(lambda s: keep(thrice(1e-18)(s), top(s)).softmax(-1)),
    "scaled to nothing afterwards": of_scores(lambda s: thrice(1e-18)(keep(s, s >= least(s))).softmax(-1)),
    "scaled before and afterwards": of_scores(
        lambda s: (keep(t := s * 1e-18 * 1e-18, t >= least(t)) * 1e-18).softmax(-1)
    ),
    "top values scaled to nothing": of_values(thrice(1e-18)),
    "top values of tiny scores": lambda q, k, v: of_values(lambda t: t * 1e-18)(q * 1e-18, k * 1e-18, v),
    "again, ranked by tiny keys": again(keys=thrice(1e-18)),
    "again, ranked by tiny scores": again(ranked=thrice(1e-18)),
    "again, tiny afterwards": again(after=thrice(1e-18)),
    "weights of weights, of hot scores": of_scores(lambda s: keep((s * 100).softmax(-1), top(s)).softmax(-1)),
}
REMEMBERED: dict[str, Model] = {
    "scaled afterwards": of_scores(lambda s: (keep(s, s >= least(s)) * 0.5 / 3).softmax(-1)),
    "a scaled order": of_scores(by_order(lambda s: s * 8 / 1e4)),
    "scaled scores": of_scores(lambda s: keep(s * 0.01, top(s)).softmax(-1)),
    "top values, scaled": of_values(lambda t: t * 0.125),
    "again, scaled": again(keys=lambda k: k * 2, after=lambda t: t * 0.3),
    "weights over their sum, by the scores": of_scores(lambda s: renormalised((s * 3).softmax(-1), top(s))),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_floats_forget(name: str) -> None:
    assert own_ks(FORGOTTEN[name]) == []


@pytest.mark.parametrize("name", REMEMBERED)
def test_what_they_do_not(name: str) -> None:
    assert own_ks(REMEMBERED[name]) == ["4"]


# ---- float16 holds less ----------------------------------------------------------------------------------------------

HALF: dict[str, tuple[Model, list[str]]] = {
    "a large factor": (of_scores(by_order(lambda s: s * 1e5)), []),
    "a small one": (of_scores(by_order(lambda s: s * 1e-7)), []),
    "again, a large one": (again(keys=lambda k: k * 1e4), []),
    "a usual one": (of_scores(by_order(lambda s: s * 0.125)), ["4"]),
    "again, a usual one": (again(keys=lambda k: k * 0.25), ["4"]),
}


@pytest.mark.parametrize("name", HALF)
def test_in_half(name: str) -> None:
    model, found = HALF[name]
    generator = torch.Generator().manual_seed(2)  # whole numbers, so that no rounding makes keys tie
    q, v = (torch.randint(1, 5, (2, 2, N, 8), generator=generator) for _ in range(2))
    q = q * torch.tensor([1.0, *[0.0] * 7])  # of one feature, in which all keys differ
    k = torch.stack([torch.randperm(N, generator=generator) / 4 - 2 for _ in range(4)]).view(2, 2, N, 1).expand_as(v)
    assert own_ks(model, [x.half() for x in (q, k, v)], alike=4e-3) == found


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """`weights(scores, scale)` with a parameter of each head, or a buffer."""

    def __init__(self, weights: object, numbers: tuple[float, float], buffer: bool) -> None:
        super().__init__()
        self.weights = weights
        scale = torch.tensor(numbers).view(1, 2, 1, 1)
        if buffer:
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.weights(q @ k.mT, self.scale) @ v  # type: ignore[operator]


def selected_without(scale: object) -> object:
    return lambda s, g: keep(s * scale(g), s >= least(s)).softmax(-1)  # type: ignore[operator]


def selected_with(scale: object) -> object:
    return lambda s, g: keep(s, (t := s * scale(g)) >= least(t)).softmax(-1)  # type: ignore[operator]


def selected_and_weighed_with(scale: object) -> object:
    return lambda s, g: keep(t := s * scale(g), t >= least(t)).softmax(-1)  # type: ignore[operator]


def scaled_afterwards(scale: object) -> object:
    return lambda s, g: (keep(s, s >= least(s)) * scale(g)).softmax(-1)  # type: ignore[operator]


CLOSED = (-200.0, 0.5)
MAY_BE_NOTHING = {
    "a closed gate": (selected_without(torch.sigmoid), CLOSED),
    "a closed gate afterwards": (scaled_afterwards(torch.sigmoid), CLOSED),
    "a gate, to select": (selected_with(torch.sigmoid), CLOSED),
    "a share of heads": (selected_without(lambda g: g.softmax(1)), (0.0, -200.0)),
    "an exponential that is 0": (selected_without(torch.exp), (-INF, 0.0)),
    "far below a parameter": (selected_without(lambda g: (g - 200).exp()), (0.0, 1.0)),
}
NEVER_NOTHING = {
    "a temperature": selected_without(lambda g: g.clamp(max=4.6).exp()),
    "a softplus": selected_with(lambda g: F.softplus(g)),
    "a temperature to divide by": scaled_afterwards(lambda g: 1 / F.softplus(g)),
    "a gate that stays open": selected_without(lambda g: g.sigmoid() + 0.1),
    "a gate clamped": selected_with(lambda g: g.clamp(min=-4).sigmoid()),
    "clamped": selected_without(lambda g: g.clamp(min=0.01)),
    "a square and a little": scaled_afterwards(lambda g: (g.square() + 1e-3).sqrt()),
}


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("name", MAY_BE_NOTHING)
def test_a_tensor_that_may_be_nothing(name: str, buffer: bool) -> None:
    weights, numbers = MAY_BE_NOTHING[name]
    if name == "an exponential that is 0" and not buffer:
        pytest.skip("no model learns a temperature of 0")
    assert own_ks(Scaled(weights, numbers, buffer)) == []


@pytest.mark.parametrize("name", NEVER_NOTHING)
def test_a_tensor_that_is_not(name: str) -> None:
    assert own_ks(Scaled(NEVER_NOTHING[name], (0.3, -0.5), buffer=False)) == ["4"]


@pytest.mark.parametrize("scale", [torch.sigmoid, lambda g: g.softmax(1), torch.exp])
def test_a_gate_of_both(scale: object) -> None:
    assert own_ks(Scaled(selected_and_weighed_with(scale), CLOSED, buffer=True)) == ["4"]


def test_of_the_inputs() -> None:
    """What is computed of the inputs may be anything, and nothing too: as a gate it may be closed."""
    gate: Model = lambda q, k, v: keep((s := q @ k.mT) * q.mean(-1, keepdim=True).exp(), top(s)).softmax(-1) @ v  # noqa: E731
    norm: Model = lambda q, k, v: keep((s := q @ k.mT) * q.abs().mean(-1, True).clamp(min=0.1), top(s)).softmax(-1) @ v  # noqa: E731
    assert own_ks(gate) == []
    assert own_ks(norm) == ["4"]


# ---- weights of an own selection -------------------------------------------------------------------------------------


def best(s: Tensor, k: int) -> Tensor:
    """Weights of the k best."""
    return keep(s, s >= least(s, k)).softmax(-1)


OF_FEW: dict[str, tuple[Weights, list[str]]] = {
    "8 of 4, again": (lambda s: renormalised(w := best(s, 4), w >= least(w, 8)), ["4"]),
    "8 of 4, scattered": (lambda s: renormalised(w := best(s, 4), top(w, 8)), ["4"]),
    "8 by weights of 4": (lambda s: keep(s, (w := best(s, 4)) >= least(w, 8)).softmax(-1), ["4"]),
    "8 by renormalised weights of 4": (
        lambda s: keep(s, top(renormalised(w := s.softmax(-1), w >= least(w)), 8)).softmax(-1),
        ["4"],
    ),
}


@pytest.mark.parametrize("name", OF_FEW)
def test_what_an_own_k_left_out_is_no_order(name: str) -> None:
    weights, found = OF_FEW[name]
    assert [k for k in own_ks(of_scores(weights)) if k not in found] == []


# ---- the row's own maximum -------------------------------------------------------------------------------------------


def without(of: Weights) -> Weights:
    return lambda s: keep(s, top(s - of(s))).softmax(-1)


ROWS: dict[str, tuple[Weights, list[str]]] = {
    "largest of a map": (without(lambda s: s.amax((-1, -2), keepdim=True)), []),
    "mean of a map": (without(lambda s: s.mean((-1, -2), keepdim=True)), []),
    "largest of all": (without(lambda s: s.amax()), []),
    "largest of the queries": (without(lambda s: s.amax(-2, keepdim=True)), []),
    "largest of a longer row": (
        lambda s: keep(s[..., :10], top((s - s.amax(-1, True))[..., :10])).softmax(-1),
        [],
    ),
    "largest of the row": (without(lambda s: s.amax(-1, keepdim=True)), ["4"]),
    "mean of the row": (without(lambda s: s.mean(-1, keepdim=True)), ["4"]),
    "of both": (lambda s: keep(t := s - s.amax(-1, keepdim=True), top(t)).softmax(-1), ["4"]),
    "of the weighed": (lambda s: keep(s - s.amax(-1, keepdim=True), top(s)).softmax(-1), ["4"]),
    "of the weighed, cooler": (lambda s: keep((s - s.amax(-1, keepdim=True)) * 1e-9, top(s)).softmax(-1), []),
}


@pytest.mark.parametrize("name", ROWS)
def test_whose_maximum(name: str) -> None:
    weights, found = ROWS[name]
    q, k, v = tensors()
    q[:, :, 0] *= 1e9
    if "longer" in name:
        model: Model = lambda q, k, v: weights(q @ k.mT) @ v[..., :10, :]  # noqa: E731
        assert own_ks(model, [q, k, v], alike=math.inf) == found
    else:
        assert own_ks(of_scores(weights), [q, k, v], alike=INF if found else 2e-5) == found
