"""A model's own selection is k-NN attention with the model's own k, or it is left alone; nothing selects on top."""

from __future__ import annotations

from typing import Any

import own_selections
import pytest
import torch
from own_selections import NK, NQ, OTHERS, OWN, B, H, Module, Selecting, tensors
from torch import Tensor, fx, nn

import kvt_compile
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes

ALIKE = 1e-12
"""float64, sums of a dozen numbers near 1."""


def captured(module: nn.Module, inputs: tuple[Tensor, ...], policy: Policy) -> tuple[fx.GraphModule, PassResult, Any]:
    kept: list[tuple[fx.GraphModule, PassResult]] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        kept.append((graph, run_passes(graph, policy, lowering="aten")))
        return fx.Interpreter(graph).run

    call = torch.compile(module, backend=backend, fullgraph=True)
    call(*inputs)
    assert len(kept) == 1
    return *kept[0], call


def gradients(call: Any, module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    out = call(*inputs)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [*inputs, *module.parameters()]
    return out, torch.autograd.grad((out * factors).sum(), wanted, allow_unused=True)


def assert_same(call: Any, module: Module) -> None:
    """Outputs, gradients, and which of these are None."""
    out, found = gradients(call, module, tensors())
    expected_out, expected = gradients(module, module, tensors())
    torch.testing.assert_close(out, expected_out, rtol=ALIKE, atol=ALIKE)
    assert [x is None for x in found] == [x is None for x in expected]
    for x, y in zip(found, expected, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=ALIKE, atol=ALIKE)


def maps(graph: fx.GraphModule) -> list[str]:
    """Nodes of the size of the attention map or larger that are computed."""
    computed = [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    values = {node.name: node.meta.get("example_value", node.meta.get("val")) for node in computed}
    return [name for name, x in values.items() if isinstance(x, Tensor) and x.numel() >= B * H * NQ * NK]


HERE = own_selections.__name__


@pytest.mark.parametrize("case", [x for x in OWN if x.forward.__module__ == HERE], ids=str)
def test_fused_with_its_own_k(case: Selecting) -> None:
    check_fused(case)


def check_fused(case: Selecting) -> None:
    """One fused site with the case's own k, no map left, outputs and gradients as they are."""
    module = case.build()
    graph, result, call = captured(module, tensors(), Policy())
    assert not result.refusals
    (decision,) = result.decisions
    assert (decision.site.tier, decision.topk, decision.own) == ("fused", case.k, True), decision.site.tier_reason
    if case.score:
        assert decision.site.score == case.score or decision.site.captured
    assert not maps(graph)
    assert not [node for node in graph.graph.nodes if "topk" in str(node.target) or "scatter" in str(node.target)]
    assert_same(call, module)


@pytest.mark.parametrize("case", [x for x in OTHERS if x.forward.__module__ == HERE], ids=str)
def test_left_alone(case: Selecting) -> None:
    check_left_alone(case)


def check_left_alone(case: Selecting) -> None:
    """Nothing is selected on top, and the report says why."""
    module = case.build()
    _, result, call = captured(module, tensors(), Policy())
    assert not result.changed
    assert not result.decisions
    (refusal,) = result.refusals
    assert refusal.step == case.step
    assert case.reason in refusal.reason
    assert_same(call, module)


@pytest.mark.parametrize("name", ["official", "boolean_scatter", "least_of_topk", "kth_value", "sorted_ascending"])
def test_by_export(name: str) -> None:
    case = next(case for case in OWN if case.name == name)
    module = case.build()
    result = kvt_compile.rewrite(module, *tensors(), lowering="aten")
    (site,) = result.report.sites
    assert (site.outcome, site.topk, site.own_k, site.keeps_own) == ("fused", 4, "4", True)
    assert f"own k = {own_selections.K}" in str(result.report)
    torch.testing.assert_close(result.module(*tensors()), module(*tensors()), rtol=ALIKE, atol=ALIKE)
