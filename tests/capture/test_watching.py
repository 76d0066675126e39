"""What a model compiles itself, outside of torch.compile, is compiled as without us while it is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as each
from torch.nn.attention.flex_attention import flex_attention

import kvt_compile
from kvt_compile import CaptureError

OPTIONS = {"topk": 1.0, "force_rewrite": True, "then": "aot_eager"}
"""Inductor of torch 2.13 fails on a map by itself."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def before(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return (self.before(self.linear(x)) @ x.mT).softmax(-1) @ self.linear(x)


class Cond(Layer):
    def before(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x.clone(), (x,))


class While(Layer):
    def before(self, x: Tensor) -> Tensor:
        (y,) = torch.while_loop(lambda y: y.sum() < 100, lambda y: (y.abs() + 1,), (x,))
        return y


class Map(Layer):
    def before(self, x: Tensor) -> Tensor:
        return each(lambda row: row * 2, x)


class Flex(Layer):
    def before(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return flex_attention(x, x * 2, x * 3, score_mod=lambda s, b, h, i, j: s + i - j)[:, 0]


@pytest.mark.parametrize("kind", [Cond, While, Map, Flex])
@torch.no_grad()
def test_it_is_looked_at(kind: type[Layer]) -> None:
    report = kvt_compile.explain(kind(), torch.randn(2, 16, 8))
    assert [site.outcome for site in report.sites] == ["fused"]
    assert [refusal.node for refusal in report.refusals] == ["flex_attention"] * (kind is Flex)


@pytest.mark.parametrize("kind", [Cond, While, Map])
def test_no_graph_has_what_it_decides(kind: type[Layer]) -> None:
    model, x = kind(), torch.randn(2, 16, 8)
    with pytest.raises(CaptureError, match="would lose"):
        kvt_compile.rewrite(model, x, topk=2)
    with torch.no_grad():
        compiled = torch.compile(model, backend="kvt", options=OPTIONS)
        torch.testing.assert_close(compiled(x), model(x))
