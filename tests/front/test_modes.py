"""Grad mode, autocast and torch.func in a model: what is rewritten keeps its gradients, which exist included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kvt_compile
from kvt_compile.passes.canonical.modes import ambient
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes

Function = Callable[..., Any]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


# ---- grad mode -------------------------------------------------------------------------------------------------------


def weights_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        w = (q @ k.mT + bias).softmax(-1)
    return w @ v


def weights_in_inference_mode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.inference_mode():
        w = (q @ k.mT + bias).softmax(-1)
    return w @ v.detach() + q.sum()


def grad_switched_by_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    w = (q @ k.mT + bias).softmax(-1)
    torch.set_grad_enabled(True)
    return w @ v


@torch.no_grad()
def _weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


def weights_by_a_decorator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return _weights(q, k) @ v + bias.sum()


def keys_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.flip(-2) * 2
    return (q @ k.mT + bias).softmax(-1) @ v


def bias_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        wide = bias[None] * 2
    return (q @ k.mT + wide).softmax(-1) @ v


def maximum_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT + bias
    with torch.no_grad():
        top = s.amax(-1, keepdim=True)
    return (s - top).softmax(-1) @ v


def out_of_inference_mode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad(), torch.inference_mode(False):  # turns grad mode on, whatever it was
        w = (q @ k.mT + bias).softmax(-1)
    return w @ v


def enabled_in_inference_mode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():  # which records nothing all the same
        s = q @ k.mT + bias
    return s.clone().softmax(-1) @ v


def in_and_out_of_inference_mode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.inference_mode(), torch.inference_mode(False):
        w = (q.clone() @ k.mT + bias).softmax(-1)
    return w @ v


def all_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        out = attention(q, k, v)
    return out + bias.sum()


def softmax_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT + bias
    with torch.no_grad():
        w = s.softmax(-1)
    return w @ v


def softmax_back_with_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        s = q @ k.mT
        with torch.enable_grad():
            t = s + bias
    return t.softmax(-1) @ v


def half_of_the_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT + bias
    with torch.no_grad():
        half = s.tanh()
    return (s + half).softmax(-1) @ v


def detached_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).detach().softmax(-1) @ v


def checkpointed_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return checkpoint(weights_without_grad, q, k, v, bias, use_reentrant=False)  # type: ignore[no-any-return]


def detached_in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return checkpoint(softmax_without_grad, q, k, v, bias, use_reentrant=False)  # type: ignore[no-any-return]


def functionally_detached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    gain = bias.mean().detach()
    return torch.func.functional_call(_SCALED, {"gain": gain}, (q, k, v)) + bias.sum()  # type: ignore[no-any-return]


def values_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    w = (q @ k.mT + bias).softmax(-1)
    with torch.no_grad():
        v = v.transpose(-1, -2).contiguous().transpose(-1, -2) * 0.5
    return w @ v


def written_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    bias = bias * 1.5
    with torch.no_grad():
        bias.mul_(2.0)
    return (q @ k.mT + bias).softmax(-1) @ v


def scores_written_without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = q @ k.mT
    with torch.no_grad():
        s += bias
    return s.softmax(-1) @ v


@dataclass(frozen=True)
class Case:
    function: Function
    outcome: str
    """"fused", "scores-kept" or a word of the refusal."""

    def __str__(self) -> str:
        return self.function.__name__


GRAD_MODE = [
    Case(weights_without_grad, "fused"),
    Case(weights_in_inference_mode, "fused"),
    Case(grad_switched_by_call, "fused"),
    Case(weights_by_a_decorator, "fused"),
    Case(keys_without_grad, "fused"),
    Case(bias_without_grad, "fused"),
    Case(maximum_without_grad, "fused"),
    Case(out_of_inference_mode, "fused"),
    Case(enabled_in_inference_mode, "fused"),
    Case(in_and_out_of_inference_mode, "fused"),
    Case(all_without_grad, "fused"),
    Case(checkpointed_without_grad, "fused"),
    Case(detached_in_a_checkpoint, "scores-kept"),
    Case(functionally_detached, "fused"),
    Case(values_without_grad, "fused"),
    Case(written_without_grad, "fused"),
    Case(softmax_without_grad, "scores-kept"),
    Case(softmax_back_with_grad, "fused"),
    Case(half_of_the_scores, "scores-kept"),
    Case(detached_scores, "scores-kept"),
    Case(scores_written_without_grad, "not a product"),
]


def rewritten(function: Function, results: list[PassResult]) -> Function:
    """The function through Dynamo and the passes, every site at k = N, run without a compiler behind."""

    def backend(gm: Any, example_inputs: Any) -> Any:
        results.append(run_passes(gm, Policy(1.0, force_rewrite=True), entry=ambient()))
        return gm.forward

    return torch.compile(function, backend=backend)


def leaves(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = (2, 3, 6, 4), (2, 3, 7, 4), (2, 3, 7, 5), (6, 7)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def outcome(result: PassResult) -> str:
    if result.decisions:
        return result.decisions[0].site.tier
    return result.refusals[0].reason


def run(function: Function, arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    out = function(*arguments)
    outs = list(out) if isinstance(out, tuple | list) else [out]
    recorded = [x for x in outs if x.requires_grad]
    if recorded:
        sum((x * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in recorded).backward()
    return [x.detach() for x in outs] + [torch.tensor([x.requires_grad for x in outs])], [x.grad for x in arguments]


def assert_same_everywhere(ours: Any, eager: Any, tolerance: float = 1e-9) -> None:
    for x, y in zip(ours[0], eager[0], strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
    assert [x is None for x in ours[1]] == [x is None for x in eager[1]]
    for x, y in zip(ours[1], eager[1], strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", GRAD_MODE, ids=str)
def test_gradients_are_the_models(case: Case) -> None:
    results: list[PassResult] = []
    ours = run(rewritten(case.function, results), leaves())
    assert_same_everywhere(ours, run(case.function, leaves()))
    assert case.outcome in outcome(results[0])


def test_without_grad_everywhere_nothing_stands_between() -> None:
    """The neighbour: a graph that runs without grad from its start has no border in it."""
    results: list[PassResult] = []
    with torch.no_grad():
        ours = run(rewritten(softmax_without_grad, results), leaves())
        assert_same_everywhere(ours, run(softmax_without_grad, leaves()))
    assert outcome(results[0]) == "fused"


@pytest.mark.parametrize("function", [weights_without_grad, softmax_without_grad])
def test_gradients_through_inductor(function: Function) -> None:
    compiled = torch.compile(function, backend="kvt", options={"topk": 1.0, "force_rewrite": True})
    assert_same_everywhere(run(compiled, leaves()), run(function, leaves()))


# ---- autocast --------------------------------------------------------------------------------------------------------


def scores_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        s = q @ k.mT
    return (s.float() + bias).softmax(-1) @ v


def attention_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (q @ k.mT + bias).softmax(-1) @ v


def scores_in_full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q, k = torch.nn.functional.linear(q, torch.eye(4)), torch.nn.functional.linear(k, torch.eye(4))
        with torch.autocast("cpu", enabled=False):
            s = q.float() @ k.float().mT
        return (s + bias).softmax(-1) @ v


@pytest.mark.parametrize("function", [scores_in_bfloat16, attention_in_bfloat16, scores_in_full])
def test_autocast_inside(function: Function) -> None:
    results: list[PassResult] = []
    inputs = [[x.detach().float().requires_grad_() for x in leaves()] for _ in range(2)]
    ours, eager = run(rewritten(function, results), inputs[0]), run(function, inputs[1])
    assert [x.dtype for x in ours[0]] == [x.dtype for x in eager[0]]
    assert_same_everywhere(ours, eager, 0.1)  # two roundings of scores near 4 to bfloat16
    assert outcome(results[0]) == "fused"


def test_multi_head_attention_inside_autocast_has_the_products_dtype() -> None:
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, x, x)[0]  # type: ignore[no-any-return]

    results: list[PassResult] = []
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(rewritten(function, results)(x), function(x), atol=0.05, rtol=0.05)
    assert all(decision.site.dtype == "bfloat16" for decision in results[0].decisions)
    assert results[0].decisions


# ---- torch.func, autograd.Function and hooks inside a compiled function ----------------------------------------------


def under_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.func.grad(lambda q: attention(q, k, v).square().sum())(q)


def under_vjp(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    out, pull = torch.func.vjp(lambda k: attention(q, k, v), k)
    return pull(out)[0]


def under_vmap(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.vmap(attention)(q, k, v)


def under_jvp(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))[0]


def under_jacrev(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.func.jacrev(lambda q: attention(q, k, v))(q[:1, :1])


def under_jacfwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.func.jacfwd(lambda v: attention(q, k, v))(v[:1, :1])


def under_hessian(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch.func.hessian(lambda q: attention(q, k[:1, :1], v[:1, :1]).sum())(q[:1, :1, :1])


class _Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * self.gain, k, v)


_SCALED = _Scaled()


def under_per_sample_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    def loss(gain: Tensor, *sample: Tensor) -> Tensor:
        return torch.func.functional_call(_SCALED, {"gain": gain}, sample).square().sum()  # type: ignore[no-any-return]

    return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(bias.mean(), q, k, v)


def under_grad_with_a_write(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    def loss(q: Tensor) -> Tensor:
        s = q @ k.mT
        s = s.clone()
        s[..., 0] = 0.0
        s.mul_(2.0)
        return (s.softmax(-1) @ v).square().sum()

    return torch.func.grad(loss)(q)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, _ = ctx.saved_tensors
        return q, k, (q @ k.mT).softmax(-1).mT @ grad


def under_a_function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return _Straight.apply(q, k, v)  # type: ignore[no-untyped-call]


def with_a_hook(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    s = q @ k.mT
    s.register_hook(lambda grad: grad * 2)
    return s.softmax(-1) @ v


DENSE = [
    Case(under_grad, "torch.func.grad"),
    Case(under_vjp, "torch.func.grad"),
    Case(under_vmap, "torch.func.vmap"),
    Case(under_jvp, "torch.func.jvp"),
    Case(under_jacrev, "torch.func.grad"),
    Case(under_jacfwd, "torch.func.vmap of torch.func.jvp"),
    Case(under_hessian, "torch.func.vmap of torch.func.jvp of torch.func.grad"),
    Case(under_per_sample_gradients, "torch.func.vmap of torch.func.grad"),
    Case(under_grad_with_a_write, "torch.func.grad"),
    Case(under_a_function, "torch.autograd.Function"),
    Case(with_a_hook, "not a product"),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_stays_dense_with_a_reason(case: Case) -> None:
    results: list[PassResult] = []
    ours = run(rewritten(case.function, results), leaves())
    assert_same_everywhere(ours, run(case.function, leaves()))
    assert case.outcome in outcome(results[0])


def test_checkpoint_inside_is_fused() -> None:
    """The neighbour of an autograd.Function: a body that torch differentiates itself."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return checkpoint(attention, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]

    results: list[PassResult] = []
    assert_same_everywhere(run(rewritten(function, results), leaves()), run(function, leaves()))
    assert outcome(results[0]) == "fused"


EXPLAINED = (under_grad, under_vmap, under_jvp, under_a_function)


@pytest.mark.parametrize("case", [case for case in DENSE if case.function in EXPLAINED], ids=str)
def test_explained(case: Case, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return case.function(*args)

    report = kvt_compile.explain(Model(), *leaves())
    assert not report.sites
    assert any(case.outcome in refusal.reason for refusal in report.refusals)
    report.to_html(tmp_path / "report.html")
