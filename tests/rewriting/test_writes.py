"""Writes to what an operator saves: the model trains as it did; nothing is copied where nothing is written later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from readings import module_of
from torch import Tensor

import kvt_compile

FORCED = {"topk": 1.0, "force_rewrite": True}
COPIES = (torch.ops.aten.clone.default, torch.ops.aten.mul.Scalar)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


# ---- the result is written to ----------------------------------------------------------------------------------------


def added(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    o += 1
    return o


def rectified(q: Tensor) -> Tensor:
    return torch.nn.functional.relu(attend(q, q, q), inplace=True) * 2


def one_row(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    o[:, 0] = 0
    return o


def without_grad(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    with torch.no_grad():
        o.mul_(3)
    return o


def detached(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    o.detach().mul_(3)
    return o


def a_view(q: Tensor) -> Tensor:
    o = attend(q, q, q).transpose(1, 2).reshape(2, 6, -1)
    o += 1
    return o


def in_a_list(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    torch._foreach_mul_([o], 2.0)
    return o


RESULTS = [added, rectified, one_row, without_grad, detached, a_view, in_a_list]

# ---- what is read is written to --------------------------------------------------------------------------------------


def a_bias(q: Tensor) -> Tensor:
    bias = q.detach().mean(-1, keepdim=True).mT * 1
    o = (q @ q.mT + bias).softmax(-1) @ q
    bias.zero_()
    return o + bias.sum()


def a_part_of_a_bias(q: Tensor) -> Tensor:
    bias = q.detach().mean(-1, keepdim=True).mT * 1
    o = (q @ q.mT + bias).softmax(-1) @ q
    bias[..., 0].add_(7)
    return o + bias.sum()


def keys_no_gradient_needs(q: Tensor) -> Tensor:
    k = q * 2
    o = (k @ q.detach().mT).softmax(-1) @ q.detach()
    k.zero_()
    return o + k


def a_bias_in_two_sites(q: Tensor) -> Tensor:
    bias = q.detach().mean(-1, keepdim=True).mT * 1
    o = (q @ q.mT + bias).softmax(-1) @ q
    o = (o @ q.mT + bias).softmax(-1) @ q
    bias.zero_()
    return o + bias.sum()


READS = [a_bias, a_part_of_a_bias, keys_no_gradient_needs, a_bias_in_two_sites]

# ---- nothing that is saved is written later --------------------------------------------------------------------------


def written_before(q: Tensor) -> Tensor:
    bias = torch.ones_like(q[..., :1]).mT
    bias += 1
    return ((q @ q.mT + bias).softmax(-1) @ q).sin()


def added_to_another(q: Tensor) -> Tensor:
    x = q.sin()
    x += attend(q, q, q)
    return x


def a_copy_is_written(q: Tensor) -> Tensor:
    o = attend(q, q, q).sin()
    o += 1
    return o


NONE = [written_before, added_to_another, a_copy_is_written]


def x_of(heads: int) -> Tensor:
    return torch.randn(2, heads, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(function: Callable[[Tensor], Tensor], x: Tensor, written_outside: bool = False) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = function(x)
    if written_outside:
        out.add_(1)
    (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def by_export(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    program = torch.export.export(module_of(function), (x.clone().requires_grad_(),))
    return kvt_compile.rewrite(program, **FORCED).module


def by_trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return kvt_compile.rewrite(module_of(function), x.clone().requires_grad_(), **FORCED).module


def through(then: str) -> Callable[..., Any]:
    return lambda function, _: torch.compile(function, backend="kvt", options={**FORCED, "then": then})


WAYS = {"export": by_export, "trace": by_trace, "eager": through("eager"), "aot_eager": through("aot_eager")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", [*RESULTS, *READS, *NONE])
def test_training_is_the_models(function: Callable[[Tensor], Tensor], way: str) -> None:
    for heads in (2, 1):
        torch.compiler.reset()
        x = x_of(heads)
        torch.testing.assert_close(trained(WAYS[way](function, x), x), trained(function, x), rtol=1e-9, atol=1e-9)


def copies(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    result = kvt_compile.rewrite(torch.export.export(module_of(function), (x,)), **FORCED)
    assert all(site.outcome == "fused" for site in result.report.sites)
    return sum(node.target in COPIES for node in result.module.graph.nodes)


def test_what_is_written_later_is_copied_once() -> None:
    assert copies(added, x_of(2)) == 1
    assert copies(a_bias, x_of(2)) == 1


@pytest.mark.parametrize("function", NONE)
def test_nothing_else_is_copied(function: Callable[[Tensor], Tensor]) -> None:
    assert copies(function, x_of(2)) == 0


# ---- somebody else writes --------------------------------------------------------------------------------------------


def returned(q: Tensor) -> Tensor:
    return attend(q, q, q)


def broken_off(q: Tensor) -> Tensor:
    o = attend(q, q, q)
    torch._dynamo.graph_break()
    o += 1
    return o


@pytest.mark.parametrize("way", [*WAYS, "inductor"])
def test_who_gets_the_result_may_write_to_it(way: str) -> None:
    x = x_of(2)
    ours = {**WAYS, "inductor": through("inductor")}[way](returned, x)
    torch.testing.assert_close(trained(ours, x, True), trained(returned, x, True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_a_write_behind_a_graph_break(then: str) -> None:
    x = x_of(2)
    torch.testing.assert_close(trained(through(then)(broken_off, x), x), trained(broken_off, x), rtol=1e-9, atol=1e-9)


def test_a_result_that_needs_no_gradient_is_handed_out_as_it_is() -> None:
    assert copies(returned, x_of(2)) == 0
    assert copies(returned, x_of(2).requires_grad_()) == 1


# ---- inference mode --------------------------------------------------------------------------------------------------


def grad_inside(q: Tensor) -> Tensor:
    with torch.inference_mode():
        with torch.enable_grad():
            o = attend(q, q, q)
        return o.clone()


def weights_too(q: Tensor) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():
        w = (q @ q.mT).softmax(-1)
        return w @ q + w.sum()


def normalised_otherwise(q: Tensor) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():
        w = (q @ q.mT).exp()
        return (w / (1 + w.sum(-1, True))) @ q


def inference(q: Tensor) -> Tensor:
    with torch.inference_mode():
        return attend(q, q, q) + 1


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [grad_inside, weights_too, normalised_otherwise, inference])
def test_in_inference_mode_nothing_is_detached(function: Callable[[Tensor], Tensor], then: str) -> None:
    if then == "aot_eager" and torch.__version__ < (2, 13):
        pytest.skip("torch 2.11 cannot trace it by AOTAutograd, whatever the backend")
    x = x_of(2).requires_grad_()
    result = through(then)(function, x)(x)
    torch.testing.assert_close(result, function(x), rtol=1e-9, atol=1e-9)
    assert not result.requires_grad
