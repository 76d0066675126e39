"""A softmax is what it computes: every way to write one is fused, and everything beside it is not.

k = N    outputs and every gradient are the model's own, and the same tensors have one
k < N    they are those of k-NN attention of the scores it is the softmax of, written by hand
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fuzz_check import set_arguments, traced
from normalisers import TABLE, Normalised, Normaliser, inputs
from spelling_checks import captured_by_dynamo
from spellings import knn_softmax
from torch import Tensor, fx, nn

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes
from kvt_compile.passes.site import Fused, Thinned

ALL = Policy(topk=1 << 20, force_rewrite=True)
EXACT = [x for x in TABLE.values() if x.of is not None]
OTHER = [x for x in TABLE.values() if x.of is None]


def run(call: Callable[..., Any], parameters: nn.Module) -> list[Tensor | None]:
    """The output and the gradients of the inputs and parameters; None where there is none."""
    tensors = inputs()
    out = call(*tensors)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    gradients = torch.autograd.grad(loss, [*tensors, *parameters.parameters()], allow_unused=True)
    return [out.detach(), *gradients]


def assert_same(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert [x is None for x in actual] == [x is None for x in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def knn(module: Normalised, case: Normaliser, topk: int) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert case.of is not None
        return case.factor * knn_softmax(case.of(module, q @ k.mT), -1, topk) @ v

    return call


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_every_softmax_is_fused(case: Normaliser) -> None:
    module = Normalised(case.function).double()
    graph = traced(module, inputs())
    result = run_passes(graph, ALL, lowering="aten")
    (decision,) = result.decisions
    plan = decision.site.plan
    assert not result.refusals
    assert isinstance(plan, Fused), decision.site.tier_reason
    assert case.score is None or plan.score == case.score
    assert_same(run(fx.Interpreter(graph).run, module), run(module, module))
    set_arguments(graph, topk=2)
    assert_same(run(fx.Interpreter(graph).run, module), run(knn(module, case, 2), module))
    assert operator.matmul not in {node.target for node in graph.graph.nodes}, "the map is still computed"


@pytest.mark.parametrize("case", OTHER, ids=lambda case: case.id)
def test_neighbours_are_none_and_are_named(case: Normaliser) -> None:
    """The formula is in the report; what is normalised by its own numerator keeps the k largest of that."""
    module = Normalised(case.function).double()
    graph = traced(module, inputs())
    result = run_passes(graph, ALL, lowering="aten")
    reasons = [decision.site.tier_reason for decision in result.decisions]
    (reason,) = reasons + [refusal.reason for refusal in result.refusals]
    assert case.says in reason
    assert len(reasons) == case.thinned
    assert_same(run(fx.Interpreter(graph).run, module), run(module, module))
    if not case.thinned:
        assert not result.changed
        return
    assert isinstance(result.decisions[0].site.plan, Thinned)
    set_arguments(graph, topk=2)
    thin = run(fx.Interpreter(graph).run, module)
    assert not torch.allclose(thin[0], run(module, module)[0]), "no key was left out"  # type: ignore[arg-type]
    module.topk = 2
    assert_same(thin, run(module, module))


_BY_DYNAMO = (
    "logarithm_of_a_softmax", "base_three", "minus_the_detached_largest", "times_a_mask", "normalised_by_name",
    "divided_afterwards", "summed_by_a_column_of_ones", "one_more",
)  # fmt: skip


@pytest.mark.parametrize("name", _BY_DYNAMO)
def test_by_dynamo(name: str) -> None:
    case = TABLE[name]
    module = Normalised(case.function).double()
    _, _, result, call = captured_by_dynamo(module, inputs(), ALL)
    assert [decision.site.tier for decision in result.decisions if decision.site.tier == "fused"] == ["fused"] * (
        case.of is not None
    )
    assert_same(run(call, module), run(module, module))


def test_a_row_whose_sum_overflows_is_its_softmax() -> None:
    """exp without the maximum subtracted is infinite beyond 709: the model's row is NaN, the kernel's is not."""
    module = Normalised(TABLE["exponential_over_its_sum"].function).double()
    graph = traced(module, inputs())
    run_passes(graph, ALL, lowering="aten")
    q, k, v = inputs()
    large = [1e3 * q, k, v]
    assert module(*large).isnan().any()
    torch.testing.assert_close(fx.Interpreter(graph).run(*large), (large[0] @ k.mT).softmax(-1) @ v)


def test_nan_in_a_row_stays_nan() -> None:
    module = Normalised(TABLE["divided_afterwards"].function).double()
    graph = traced(module, inputs())
    run_passes(graph, ALL, lowering="aten")
    q, k, v = inputs()
    q = q.detach().clone()
    q[0, 0, 1] = torch.nan
    torch.testing.assert_close(fx.Interpreter(graph).run(q, k, v), module(q, k, v), equal_nan=True)


def test_in_place() -> None:
    class InPlace(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            e = q @ k.mT
            e.exp_()
            e /= e.sum(-1, keepdim=True)
            return e @ v

    tensors = [x.detach() for x in inputs()]
    graph = traced(InPlace(), tensors)
    (decision,) = run_passes(graph, ALL, lowering="aten").decisions
    assert decision.site.tier == "fused"
    torch.testing.assert_close(fx.Interpreter(graph).run(*tensors), InPlace()(*tensors))


@pytest.mark.parametrize(
    "make",
    [torch.exp, lambda s: 3.0**s, lambda s: s.exp() * (s.new_ones(5, 5).tril() > 0), lambda s: s.sigmoid()],
    ids=["exp", "base", "mask", "sigmoid"],
)
def test_weights_that_are_returned_too(make: Callable[[Tensor], Tensor]) -> None:
    """Somebody reads the map: it is made, by one row kernel, of what was read by algebra."""

    class Returned(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            e = make(q @ k.mT)
            weights = e / e.sum(-1, keepdim=True)
            return weights @ v, weights

    graph = traced(Returned(), [x.detach() for x in inputs()])
    (decision,) = run_passes(graph, ALL, lowering="aten").decisions
    assert decision.site.tier == "scores-kept"
    results = []
    for call in (fx.Interpreter(graph).run, Returned()):
        tensors = inputs()
        out, weights = call(*tensors)
        results.append([out, weights, *torch.autograd.grad(out.sum() + (weights**2).sum(), tensors)])
    assert_same(*results)


def test_scores_that_were_written_over() -> None:
    """Somebody reads the map, and what it is a softmax of is gone: left as it is."""

    class Returned(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            e = q @ k.mT
            e.exp_()
            weights = e / e.sum(-1, keepdim=True)
            return weights @ v, weights

    tensors = [x.detach() for x in inputs()]
    graph = traced(Returned(), tensors)
    result = run_passes(graph, ALL, lowering="aten")
    assert not result.decisions
    assert "read by" in result.refusals[0].reason
    for mine, theirs in zip(fx.Interpreter(graph).run(*tensors), Returned()(*tensors), strict=True):
        torch.testing.assert_close(mine, theirs)
