"""The four operators of the kvt:: namespace, registered with torch.library.  Importing this module registers them.

    kvt::attention             q, k, v, captured -> out, logsumexp, threshold
    kvt::attention_backward    grad_out, ...     -> dq, dk, dv, dcaptured     (empty where not needed)
    kvt::topk_softmax          scores            -> weights
    kvt::topk_softmax_backward grad, weights     -> dscores

q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hk, Nk, Dv]` with any strides; out `[B, Hq, Nq, Dv]` in v's dtype;
logsumexp and threshold `[B, Hq, Nq]` in float32 (float64 when q is float64), not differentiable.  All results are
contiguous.  Everything that changes a result is an argument, so compile caches key on it by themselves.  `tolerance`
lets a row keep another number of keys than topk (`kvt_compile.topk.kept_range`) and has a default, so that programs
saved without it still load; the backward reads what was kept from the thresholds.  `draw` (`kernels/dropout.py`) has
one too: it is given where a call is a part of a larger one, whose dropout it draws.  So have `select`, which keys may
be kept at all and how they are ranked (`kvt_compile.select`; empty: the topk best of all), and `grid` and `prefix`,
where the tokens stand.  `captured` and `sizes` may be None, which means empty: AOTInductor's proxy executor hands an
empty list on as None, and a schema without `?` would refuse it.

For who splits a call over devices: a grid is that of all tokens, so with a `select` neither queries nor keys can be
split.  The batch can; heads can where `select` has none of `shifted`, `regions`
and `heads`, which count them.

Raw `Library.define`/`impl` and not `custom_op`: the schema stands here as text that a reader and a saved program can be
checked against, and a call costs 2 to 5 microseconds less (measured: 12 against 14, 19 against 24 with a gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from kvt_compile.kernels.op import flops, function, lowerings, ready, vmap
from kvt_compile.kernels.op.arguments import (
    AttentionArguments,
    BackwardArguments,
    SoftmaxArguments,
    SoftmaxBackwardArguments,
    binder,
)
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.check import check_attention, check_backward, check_softmax, check_softmax_backward
from kvt_compile.kernels.op.function import no_second_derivative
from kvt_compile.kernels.op.spec import SoftmaxSpec, reached

_SELECT = 'str select="", SymInt[]? grid=None, SymInt prefix=0'
_GRID = 14  # its place among the arguments of the forward
_COMMON = "str score, str weight, SymInt topk, SymInt[]? sizes, float dropout_p, Tensor? seed"

LIBRARY = torch.library.Library("kvt", "DEF")
# flexible_layout: results are contiguous whatever the strides of the inputs, so Inductor may choose those freely
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor[]? captured, {_COMMON}, str lowering,"
    f" float tolerance=0.0, SymInt[]? draw=None, {_SELECT}) -> (Tensor out, Tensor logsumexp, Tensor threshold)",
    tags=_TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor[]? captured, Tensor out, Tensor"
    f" logsumexp, Tensor threshold, {_COMMON}, bool[] needs_grad, str lowering, SymInt[]? draw=None, {_SELECT})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dcaptured)",
    tags=_TAGS,
)
LIBRARY.define(
    "topk_softmax(Tensor scores, int dim, SymInt topk, ScalarType dtype, str lowering, float tolerance=0.0) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "topk_softmax_backward(Tensor grad, Tensor weights, int dim, ScalarType input_dtype, str lowering) -> Tensor",
    tags=_TAGS,
)


def _without_autocast(device: str) -> AbstractContextManager[None]:
    # The ops fall through autocast, but autocast is still on for the operators a lowering calls: it would round s.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


# --- kvt::attention ---------------------------------------------------------------------------------------------------


def _attention(a: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    lowerings.check_inside(a.lowering)
    key = ready.key(a)
    if (run := ready.runner(key)) is not None:
        return run(a.q, a.k, a.v, a.captured or ())  # type: ignore[no-any-return]
    check_attention(a)
    call = AttentionCall.of(a, topk=min(a.topk, a.k.shape[2]))
    chosen = lowerings.choose(a.lowering, call.spec, a.q.device.type)
    with _without_autocast(a.q.device.type):
        result = chosen.forward(call)
    ready.remember(key, chosen, call)
    return result


def _attention_fake(a: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(a)
    rows = a.q.shape[:3]
    accumulate = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    return (
        a.v.new_empty((*rows, a.v.shape[3])),
        a.q.new_empty(rows, dtype=accumulate),
        a.q.new_empty(rows, dtype=accumulate),
    )


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    a = attention_arguments(*inputs)
    out, logsumexp, threshold = output
    ctx.mark_non_differentiable(logsumexp, threshold)
    ctx.save_for_backward(a.q, a.k, a.v, *(a.captured or ()), out, logsumexp, threshold, a.seed)
    ctx.rest = (a.score, a.weight, a.topk, a.sizes, a.dropout_p, a.lowering, a.draw)
    ctx.select = (a.select, a.grid, a.prefix)
    ctx.nothing = a.captured is None


def _attention_autograd(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *captured, out, logsumexp, threshold, seed = ctx.saved_tensors
    score, weight, topk, sizes, dropout_p, lowering, draw = ctx.rest
    need_q, need_k, need_v, need_captured, *_rest = ctx.needs_input_grad
    needs_grad = [need_q, need_k, need_v, *(() if ctx.nothing else need_captured)]
    there = reached(score, weight, len(captured))
    needs_grad = [need and reaches for need, reaches in zip(needs_grad, there, strict=True)]
    dq, dk, dv, dcaptured = torch.ops.kvt.attention_backward(
        grad_out, q, k, v, captured, out, logsumexp, threshold,
        score, weight, topk, sizes, dropout_p, seed, needs_grad, lowering, draw, *ctx.select,
    )  # fmt: skip
    dq, dk, dv, *dcaptured = (x if need else None for x, need in zip((dq, dk, dv, *dcaptured), needs_grad, strict=True))
    # register_autograd takes None or a list of numbers for one value, and an empty list for a list of tensors; it wants
    # as many results as there were arguments, and the dispatcher drops a last one that equals its default
    others: list[Any] = [None] * (len(ctx.needs_input_grad) - 8)
    if len(others) > _GRID - 8 and ctx.select[1] is not None and not ctx.select[1]:
        others[_GRID - 8] = []
    of_captured = None if ctx.nothing else list(dcaptured)
    of_sizes: list[None] | None = [] if sizes is not None and not sizes else None
    return dq, dk, dv, of_captured, None, None, None, of_sizes, *others


# --- kvt::attention_backward ------------------------------------------------------------------------------------------


def _attention_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    key = ready.backward_key(a)
    if (run := ready.runner(key)) is not None:
        saved = a.out, a.logsumexp, a.threshold
        return run(a.grad_out, a.q, a.k, a.v, a.captured or (), *saved)  # type: ignore[no-any-return]
    check_attention(a)
    check_backward(a)
    call = AttentionCall.of(a, topk=min(a.topk, a.k.shape[2]), needs_grad=a.needs_grad)
    with _without_autocast(a.q.device.type):
        chosen = lowerings.choose(a.lowering, call.spec, a.q.device.type)
        dq, dk, dv, dcaptured = chosen.backward(call, a.grad_out, a.out, a.logsumexp, a.threshold)
    ready.remember(key, chosen, call, a.grad_out)
    inputs, gradients = (a.q, a.k, a.v, *call.captured), (dq, dk, dv, *dcaptured)
    full = [x.new_empty(0) if dx is None else dx for x, dx in zip(inputs, gradients, strict=True)]
    return full[0], full[1], full[2], full[3:]


def _attention_backward_fake(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    check_attention(a)
    check_backward(a)
    dq, dk, dv, *dcaptured = (
        x.new_empty(x.shape) if need else x.new_empty(0)
        for x, need in zip((a.q, a.k, a.v, *(a.captured or ())), a.needs_grad, strict=True)
    )
    return dq, dk, dv, dcaptured


# --- kvt::topk_softmax ------------------------------------------------------------------------------------------------


def _topk_softmax(a: SoftmaxArguments) -> Tensor:
    dim = check_softmax(a)
    lowerings.check_inside(a.lowering)
    if a.scores.numel() == 0:
        return torch.empty(a.scores.shape, dtype=a.dtype, device=a.scores.device)
    chosen = lowerings.choose(a.lowering, SoftmaxSpec.of(a.scores.dtype, a.dtype), a.scores.device.type)
    with _without_autocast(a.scores.device.type):
        keys = a.scores.shape[dim] if a.scores.dim() else 1
        return chosen.softmax(a.scores, dim, min(a.topk, keys), a.dtype, a.tolerance)


def _topk_softmax_fake(a: SoftmaxArguments) -> Tensor:
    check_softmax(a)
    return a.scores.new_empty(a.scores.shape, dtype=a.dtype)


def _topk_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = softmax_arguments(*inputs)
    ctx.save_for_backward(output)
    ctx.rest = (a.dim, a.scores.dtype, a.lowering)


def _topk_softmax_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (weights,) = ctx.saved_tensors
    return torch.ops.kvt.topk_softmax_backward(grad, weights, *ctx.rest), None, None, None, None, None


def _topk_softmax_backward(a: SoftmaxBackwardArguments) -> Tensor:
    dim = check_softmax_backward(a)
    if a.weights.numel() == 0:
        return torch.empty(a.weights.shape, dtype=a.input_dtype, device=a.weights.device)
    chosen = lowerings.choose(a.lowering, SoftmaxSpec.of(a.input_dtype, a.weights.dtype), a.weights.device.type)
    with _without_autocast(a.weights.device.type):
        return chosen.softmax_backward(a.grad, a.weights, dim, a.input_dtype)


def _topk_softmax_backward_fake(a: SoftmaxBackwardArguments) -> Tensor:
    check_softmax_backward(a)
    return a.weights.new_empty(a.weights.shape, dtype=a.input_dtype)


# --- registration -----------------------------------------------------------------------------------------------------


attention_arguments = binder(AttentionArguments, torch.ops.kvt.attention.default)
backward_arguments = binder(BackwardArguments, torch.ops.kvt.attention_backward.default)
softmax_arguments = binder(SoftmaxArguments, torch.ops.kvt.topk_softmax.default)
softmax_backward_arguments = binder(SoftmaxBackwardArguments, torch.ops.kvt.topk_softmax_backward.default)


def _of(bind: Callable[..., Any], run: Callable[[Any], Any]) -> Callable[..., Any]:
    """What takes a record -> what takes the operator's arguments."""
    return lambda *args, **kwargs: run(bind(*args, **kwargs))


for _name, _bind, _implementation, _fake in (
    ("attention", attention_arguments, _attention, _attention_fake),
    ("attention_backward", backward_arguments, _attention_backward, _attention_backward_fake),
    ("topk_softmax", softmax_arguments, _topk_softmax, _topk_softmax_fake),
    ("topk_softmax_backward", softmax_backward_arguments, _topk_softmax_backward, _topk_softmax_backward_fake),
):
    LIBRARY.impl(_name, _of(_bind, _implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvt::{_name}", _of(_bind, _fake), lib=LIBRARY)
    LIBRARY.impl(_name, _of(_bind, function.UNDER_TRANSFORMS[_name]), "FuncTorchDynamicLayerFrontMode")


class _Ahead:
    """The library as `register_autograd` uses it: no dual tensor comes to autograd's kernels, and attention is looked
    up among checked calls ahead of its one."""

    def impl(self, name: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool) -> None:
        kernel = function.without_tangents(kernel)
        if name == "attention":
            kernel = ready.before_autograd(lowerings.check_inside, kernel)
        LIBRARY.impl(name, kernel, key, with_keyset=with_keyset)


for _name, _backward, _setup in (
    ("attention", _attention_autograd, _attention_setup),
    ("topk_softmax", _topk_softmax_autograd, _topk_softmax_setup),
    ("attention_backward", no_second_derivative, None),
    ("topk_softmax_backward", no_second_derivative, None),
):
    _library = cast(torch.library.Library, _Ahead())
    torch.library.register_autograd(f"kvt::{_name}", _backward, setup_context=_setup, lib=_library)
vmap.register(LIBRARY)
flops.register()
