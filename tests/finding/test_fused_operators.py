"""The operators that SDPA runs are read as SDPA, where nothing but their output is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spellings import B, D, H, N
from torch import Tensor, nn

import kvt_compile

aten = torch.ops.aten


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.call(q, k, v)


READ: dict[str, tuple[Callable[..., Any], str]] = {
    "flash": (lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0], "0.5*s"),
    "packet": (lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0)[0], "0.5*s"),
    "causal": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True, scale=2.0)[0],
        "where(le(j, i), 2.0*s, -oo)",
    ),
    "math": (lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v)[0], "0.5*s"),
}
OTHER: dict[str, Callable[..., Any]] = {
    "its log-sum-exps": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v),
    "its weights": lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v),
}


def exported(call: Callable[..., Any]) -> tuple[Calls, tuple[Tensor, ...], Any]:
    torch.manual_seed(0)
    tensors = tuple(torch.randn(B, H, N, D) for _ in range(3))
    module = Calls(call)
    return module, tensors, kvt_compile.rewrite(torch.export.export(module, tensors), topk=1.0, force_rewrite=True)


@pytest.mark.parametrize("name", READ)
def test_read_as_sdpa(name: str) -> None:
    call, score = READ[name]
    module, tensors, result = exported(call)
    (site,) = result.report.sites
    assert (site.outcome, site.score) == ("fused", score)
    assert not result.report.refusals
    torch.testing.assert_close(result.module(*tensors), module(*tensors))
    assert not any("_scaled_dot_product" in str(node.target) for node in result.module.graph.nodes)


@pytest.mark.parametrize("name", OTHER)
def test_neighbours_whose_other_results_are_read(name: str) -> None:
    module, tensors, result = exported(OTHER[name])
    assert not result.report.sites
    assert "more than its output" in result.report.refusals[0].reason
    for mine, theirs in zip(result.module(*tensors), module(*tensors), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda m, v: m.table, "with a parameter"),
        (lambda m, v: torch.linspace(0, 1, N), "a constant that the model makes"),
    ],
    ids=["parameter", "constant"],
)
def test_values_that_are_none(values: Callable[..., Tensor], words: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(N, D))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-1) @ values(self, v)

    tensors = tuple(torch.randn(B, H, N, D) for _ in range(3))
    report = kvt_compile.rewrite(torch.export.export(Model(), tensors), topk=2).report
    assert not report.sites
    assert words in report.refusals[0].reason
