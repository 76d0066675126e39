"""An own k that depends on the number of keys stays what the model computes, at every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes

INF = float("inf")


def half_by_mask(t: Tensor) -> Tensor:
    index = t.topk(int(t.shape[-1] * 0.5), dim=-1)[1]
    return torch.where(torch.zeros_like(t).scatter_(-1, index, 1.0) > 0, t, -INF)


def half_by_threshold(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.topk(t.shape[-1] // 2)[0][..., -1:], -INF)


def half_by_last(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.topk(t.shape[-1] // 2)[0][..., -1].unsqueeze(-1), -INF)


def half_by_least(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.topk(t.shape[-1] // 2)[0].amin(-1, keepdim=True), -INF)


def all_but_a_few(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.kthvalue(4, dim=-1, keepdim=True)[0], -INF)


def half_by_kth_value(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.kthvalue(t.shape[-1] // 2, dim=-1, keepdim=True)[0], -INF)


def four_by_kth_value(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.kthvalue(t.shape[-1] - 3, dim=-1, keepdim=True)[0], -INF)


def four_at_most(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.topk(min(4, t.shape[-1]))[0][..., -1:], -INF)


def four_sorted(t: Tensor) -> Tensor:
    return t.masked_fill(t < t.sort(-1, descending=True)[0][..., 3:4], -INF)


ALL = [
    half_by_mask, half_by_threshold, half_by_last, half_by_least, all_but_a_few, half_by_kth_value, four_by_kth_value,
    four_at_most, four_sorted,
]  # fmt: skip


@pytest.mark.parametrize("selected", ALL, ids=lambda f: f.__name__)
def test_at_two_sizes(selected: Callable[[Tensor], Tensor]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selected(q @ k.mT).softmax(-1) @ v

    results: list[PassResult] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        results.append(run_passes(graph, Policy(), lowering="aten"))
        return fx.Interpreter(graph).run

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for keys in (11, 16):
        shapes = (2, 3, 7, 4), (2, 3, keys, 4), (2, 3, keys, 5)
        q, k, v = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
        out, expected = compiled(q, k, v), model(q, k, v)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        for x, y in zip(found, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    (result,) = results
    (decision,) = result.decisions
    assert (decision.site.tier, decision.own) == ("fused", True), decision.site.tier_reason
