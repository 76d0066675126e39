"""What a rewritten graph loses and what it must not: dead code goes, an input stays, no name is given away twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

ATTENTION = torch.ops.kvt.attention.default


def four_best(q: Tensor, t: Tensor) -> Tensor:
    """The model keeps four keys by itself; `t` is read by nothing but their order."""
    x = q @ q.mT
    best = (x * t.exp().clamp(min=0.1)).topk(4, -1).indices
    kept = torch.zeros_like(x, dtype=torch.bool).scatter(-1, best, True)
    return x.masked_fill(~kept, -torch.inf).softmax(-1) @ q


class Given(nn.Module):
    def forward(self, q: Tensor, t: Tensor) -> Tensor:
        return four_best(q, t)


class Held(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        t = torch.linspace(-1.0, 1.0, 2).view(1, 2, 1, 1)
        if kind == "parameter":
            self.t = nn.Parameter(t)
        else:
            self.register_buffer("t", t)

    def forward(self, q: Tensor) -> Tensor:
        return four_best(q, self.t)


class ReadElsewhere(nn.Module):
    def forward(self, q: Tensor, t: Tensor) -> Tensor:
        return four_best(q, t) * t


def q_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SCALE = torch.tensor([0.5, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "an input": (Given, (SCALE,)),
    "a parameter": (lambda: Held("parameter"), ()),
    "a buffer": (lambda: Held("buffer"), ()),
    "an input that is read elsewhere": (ReadElsewhere, (SCALE,)),
}


def by_trace(model: nn.Module, *inputs: Tensor) -> Any:
    return kvt_compile.rewrite(model, *inputs).module


def by_export(model: nn.Module, *inputs: Tensor) -> Any:
    return kvt_compile.rewrite(torch.export.export(model, inputs), *inputs).module


def by_dynamo(model: nn.Module, *_: Tensor) -> Any:
    return torch.compile(model, backend="kvt", options={"then": "eager"})


CASES = [(name, capture) for name in MODELS for capture in (by_trace, by_export, by_dynamo)]
CASES.remove(("a buffer", by_trace))  # a tracer computes the exponential of a buffer once, and nothing knows it as one


@pytest.mark.parametrize(("name", "capture"), CASES)
def test_an_input_that_only_the_order_of_a_selection_reads_stays(name: str, capture: Callable[..., Any]) -> None:
    build, more = MODELS[name]
    model, inputs = build(), (q_of(2, 2, 8, 4), *more)
    result = capture(model, *inputs)
    torch.testing.assert_close(result(*inputs), model(*inputs))
    if capture is not by_dynamo:
        assert model.state_dict().keys() <= result.state_dict().keys()
        assert [node.target for node in result.graph.nodes].count(ATTENTION) == 1
        assert not any("topk.default" in str(node.target) for node in result.graph.nodes), "the selection is dead"


# ---- names -----------------------------------------------------------------------------------------------------------


class WithoutGrad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k = x.chunk(2, -1)
        with torch.no_grad():
            a = (q @ k.mT).softmax(-1) @ k
        return a + q


class GradWithin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k = x.chunk(2, -1)
        with torch.no_grad():
            y = q.sin()
            with torch.enable_grad():
                a = (q @ k.mT).softmax(-1) @ k
            y = y + a
        return y + q


class Pieces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (4, 2)).permute(3, 0, 1, 2, 4).unbind(0)[:3]
        return torch.no_grad()(lambda: (q @ k.mT).softmax(-1) @ v)() * 2


class WithGrad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k = x.chunk(2, -1)
        return (q @ k.mT).softmax(-1) @ k + q


@pytest.mark.parametrize("build", [WithoutGrad, GradWithin, Pieces, WithGrad])
def test_bodies_whose_names_export_has_changed(build: Callable[[], nn.Module]) -> None:
    model, x = build(), q_of(2, 3, 6, 8)
    result = kvt_compile.rewrite(model, x, topk=1.0, force_rewrite=True)
    torch.testing.assert_close(result.module(x), model(x))
    assert [site.outcome for site in result.report.sites] == ["fused"]
