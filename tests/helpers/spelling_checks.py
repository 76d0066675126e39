"""What a spelling has to show: the fates of its softmaxes, and the meaning of what they became.

k = N, float32     outputs and every gradient are as near the float64 original as the float32 original is
k < N, float64     they are those of the original run with k-NN softmax in place of torch's (`knn_attention`)
lowering           the reference lowering gives what the default one gives
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_check import set_arguments
from oracles import FACTOR
from spellings import Spelling, knn_attention
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.passes.site import AttentionSite, Fused

EVERYTHING = 1 << 20


@dataclass(frozen=True)
class Rewritten:
    """A captured and rewritten spelling; `call` runs it, whatever its nodes are changed to."""

    spelling: Spelling
    module: nn.Module
    graph: fx.GraphModule
    result: PassResult
    fates: tuple[str, ...]
    reasons: tuple[str, ...]
    call: Callable[..., Any]

    @property
    def sites(self) -> list[AttentionSite]:
        return [decision.site for decision in self.result.decisions]

    def with_arguments(self, **changes: Any) -> Callable[..., Any]:
        set_arguments(self.graph, **changes)
        return self.call


def captured_by_dynamo(
    module: nn.Module, inputs: Sequence[Tensor], policy: Policy
) -> tuple[fx.GraphModule, Any, Any, Any]:
    """(graph, node order, pass result, callable): torch.compile with the passes and no compiler behind them."""
    kept: list[tuple[fx.GraphModule, dict[fx.Node, int], PassResult]] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        order = {node: n for n, node in enumerate(graph.graph.nodes)}
        kept.append((graph, order, run_passes(graph, policy, lowering="aten")))
        return fx.Interpreter(graph).run

    call = torch.compile(module, backend=backend, fullgraph=True)
    call(*inputs)
    assert len(kept) == 1, "one graph, compiled once"
    return *kept[0], call


def rewritten_by(
    spelling: Spelling,
    dtype: torch.dtype,
    capture: Callable[[nn.Module, Sequence[Tensor]], fx.GraphModule] | None = None,
) -> Rewritten:
    """Captures (through Dynamo unless told otherwise) and rewrites with the spelling's k."""
    module, policy = spelling.build(dtype), Policy(topk=spelling.topk, force_rewrite=True)
    if capture is None:
        with torch.set_grad_enabled(spelling.trainable):
            graph, order, result, call = captured_by_dynamo(
                module, spelling.tensors(dtype, grad=spelling.trainable), policy
            )
    else:
        graph = capture(module, spelling.tensors(dtype))
        order = {node: n for n, node in enumerate(graph.graph.nodes)}
        result = run_passes(graph, policy, lowering="aten")
        call = fx.Interpreter(graph).run
    fates, reasons = fates_of(result, order)
    return Rewritten(spelling, module, graph, result, fates, reasons, call)


def fates_of(result: PassResult, order: dict[fx.Node, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What became of every softmax, in program order, and why where it was not fused."""
    found: dict[fx.Node, tuple[str, str]] = {}
    for decision in result.decisions:
        site = decision.site
        dense = decision.topk is None
        found[site.softmax] = ("dense" if dense else site.tier, decision.reason if dense else site.tier_reason)
    for refusal in result.refusals:
        assert refusal.node not in found, f"{refusal.node} is a site and a refusal"
        found[refusal.node] = ("refused", refusal.reason)
    ordered = [found[node] for node in sorted(found, key=lambda node: order.get(node, 0))]
    return tuple(fate for fate, _ in ordered), tuple(reason for _, reason in ordered)


def assert_fates(rewritten: Rewritten) -> None:
    """Tiers, score and weight text, and a reason for everything that is not fused."""
    spelling = rewritten.spelling
    assert rewritten.fates == spelling.fates, f"{rewritten.fates}: {rewritten.reasons}"
    for fate, reason in zip(rewritten.fates, rewritten.reasons, strict=True):
        assert (fate == "fused") == (not reason), f"{fate}: {reason!r}"
    if spelling.reason:
        first = next(reason for reason in rewritten.reasons if reason)
        assert spelling.reason in first, first
    plan = rewritten.sites[0].plan if rewritten.sites else None
    if spelling.score is not None:
        assert isinstance(plan, Fused)
        assert plan.score == spelling.score
    if spelling.weight is not None:
        assert isinstance(plan, Fused)
        assert plan.weight == spelling.weight


@dataclass(frozen=True)
class Shown:
    """Everything one run shows."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def show(call: Callable[..., Any], spelling: Spelling, module: nn.Module, dtype: torch.dtype) -> Shown:
    """Runs a spelling and, where autograd allows it, a backward of a fixed random projection of its outputs."""
    inputs = spelling.tensors(dtype, grad=spelling.trainable)
    with torch.set_grad_enabled(spelling.trainable):
        outputs = [x for x in pytree.tree_leaves(call(*inputs)) if isinstance(x, Tensor)]
    wanted = dict(module.named_parameters()) | {f"input {n}": x for n, x in enumerate(inputs) if x.requires_grad}
    gradients: dict[str, Tensor] = {}
    if spelling.trainable:
        generator = torch.Generator().manual_seed(3)
        projections = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
        loss = torch.stack([(x * r).sum() for x, r in zip(outputs, projections, strict=True)]).sum()
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        gradients = {
            n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), found, strict=True)
        }
    return Shown(tuple(x.detach() for x in outputs), gradients)


def assert_equal(actual: Shown, exact: Shown, plain: Shown, what: str, *, unit: float = 1.0) -> None:
    """`exact` in float64, `plain` the eager computation in float32: the budget is a few times its error."""
    assert len(actual.outputs) == len(exact.outputs)
    names = [f"output {n}" for n in range(len(exact.outputs))] + list(exact.gradients)
    every = [(*x.outputs, *x.gradients.values()) for x in (actual, exact, plain)]
    for name, mine, right, rough in zip(names, *every, strict=True):
        assert mine.shape == right.shape, f"{what}, {name}: {tuple(mine.shape)}"
        if not right.numel():
            continue
        scale = float(right.abs().max())
        budget = unit * (
            FACTOR * float((rough.double() - right).abs().max()) + 4 * torch.finfo(torch.float32).eps * (scale + 1)
        )
        error = float((mine.double() - right).abs().max())
        assert error <= budget, f"{what}, {name}: off by {error:.2e}, allowed {budget:.2e}, size {scale:.2e}"


def assert_meaning(spelling: Spelling, rewritten: Rewritten, dtype: torch.dtype, *, selecting: bool) -> None:
    """k = N equals dense; with `selecting` also: k < N equals k-NN attention by hand, and the reference lowering."""
    original, rough = spelling.build(torch.float64), spelling.build(torch.float32)
    exact = show(original, spelling, original, torch.float64)
    plain = show(rough, spelling, rough, torch.float32)
    unit = 1.0 if dtype == torch.float32 else torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    dense = show(rewritten.with_arguments(topk=EVERYTHING, lowering="aten"), spelling, rewritten.module, dtype)
    assert_equal(dense, exact, plain, "k = N", unit=unit)
    if not selecting:
        return
    with knn_attention(spelling.fates, spelling.topk):
        chosen = show(original, spelling, original, torch.float64)
    with knn_attention(spelling.fates, spelling.topk):
        plain = show(rough, spelling, rough, torch.float32)
    assert all(
        torch.allclose(x.double(), y, rtol=1e-3, atol=1e-4) for x, y in zip(plain.outputs, chosen.outputs, strict=True)
    ), "a near-tie: not a test of the passes; choose other inputs"
    mine = show(rewritten.with_arguments(topk=spelling.topk, lowering="aten"), spelling, rewritten.module, dtype)
    assert_equal(mine, chosen, plain, f"k = {spelling.topk}", unit=unit)
    other = show(rewritten.with_arguments(lowering="reference"), spelling, rewritten.module, dtype)
    assert_equal(other, chosen, plain, "the reference lowering", unit=unit)
    if spelling.positive:
        assert not torch.allclose(chosen.outputs[0], exact.outputs[0]), "no key was left out: this shows nothing"
