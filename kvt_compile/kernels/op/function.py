"""The operators as torch.autograd.Functions: what they are under transforms of torch.func (grad, vjp, vmap, jacrev).

An operator registered by `register_autograd` refuses to be differentiated there ("must override the setup_context
staticmethod").  So where a transform is active the dispatcher comes here first, before any level is taken off: the key
FuncTorchDynamicLayerFrontMode.  Each Function calls its operator again one level further out; outside of all levels the
operator itself runs.  `vmap.py` has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from kvt_compile.kernels.op import vmap
from kvt_compile.kernels.op.arguments import (
    AttentionArguments,
    BackwardArguments,
    SoftmaxArguments,
    SoftmaxBackwardArguments,
)

_ARGUMENTS = 15  # before the captured tensors


class _Attention(torch.autograd.Function):
    """apply(q, k, v, score, weight, topk, sizes, dropout_p, seed, lowering, tolerance, draw, select, grid, prefix,
    *captured) -> out, logsumexp, threshold."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        captured = list(rest[_ARGUMENTS - 3 :])
        return torch.ops.kvt.attention(q, k, v, captured, *rest[: _ARGUMENTS - 3])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, score, weight, topk, sizes, dropout_p, seed, lowering, _tolerance, *rest = inputs
        last, captured = rest[:4], rest[4:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, seed, *output, *captured)
        ctx.rest = (score, weight, topk, sizes, dropout_p, lowering, last)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seed, *saved = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[_ARGUMENTS:]]
        gradients = _AttentionBackward.apply(ctx.rest, needs_grad, grad_out, q, k, v, seed, *saved)  # type: ignore[no-untyped-call]
        gradients = [dx if need else None for dx, need in zip(gradients, needs_grad, strict=True)]
        return (*gradients[:3], *[None] * (_ARGUMENTS - 3), *gradients[3:])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        def ordered(x: Sequence[Any]) -> tuple[Any, ...]:  # as the operator has them
            return (*x[:3], list(x[_ARGUMENTS:]), *x[3:_ARGUMENTS])

        return vmap.attention(info.batch_size, ordered(in_dims), *ordered(args))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        no_forward_mode(ctx)


class _AttentionBackward(torch.autograd.Function):
    """The operator's backward; differentiated (into an error) under torch.func, which always creates the graph."""

    @staticmethod
    def forward(rest: tuple[Any, ...], needs_grad: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, dcaptured = torch.ops.kvt.attention_backward(*_backward_arguments(rest, needs_grad, *tensors))
        return (dq, dk, dv, *dcaptured)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        no_second_derivative(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], rest: Any, needs_grad: Any, *tensors: Any) -> tuple[Any, Any]:
        dims = _backward_arguments((*[None] * (len(rest) - 1), (None,) * len(rest[-1])), None, *in_dims[2:])
        (dq, dk, dv, dcaptured), out_dims = vmap.attention_backward(
            info.batch_size, dims, *_backward_arguments(rest, needs_grad, *tensors)
        )
        return (dq, dk, dv, *dcaptured), (*out_dims[:3], *out_dims[3])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        no_forward_mode(ctx)


def _backward_arguments(rest: Sequence[Any], needs_grad: Any, *tensors: Any) -> tuple[Any, ...]:
    """The order of the operator."""
    score, weight, topk, sizes, dropout_p, lowering, last = rest
    grad_out, q, k, v, seed, out, logsumexp, threshold, *captured = tensors
    return (
        grad_out, q, k, v, captured, out, logsumexp, threshold,
        score, weight, topk, sizes, dropout_p, seed, needs_grad, lowering, *last,
    )  # fmt: skip


class _TopkSoftmax(torch.autograd.Function):
    """apply(scores, dim, topk, dtype, lowering, tolerance) -> weights."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.kvt.topk_softmax(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, dim, _, _, lowering, _tolerance = inputs
        ctx.save_for_backward(output)
        ctx.rest = (dim, scores.dtype, lowering)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        return _TopkSoftmaxBackward.apply(grad, weights, *ctx.rest), *[None] * 5  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        return vmap.topk_softmax(info.batch_size, in_dims, *args)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        no_forward_mode(ctx)


class _TopkSoftmaxBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.kvt.topk_softmax_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        no_second_derivative(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        return vmap.topk_softmax_backward(info.batch_size, in_dims, *args)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        no_forward_mode(ctx)


def no_second_derivative(ctx: Any, *_: Any) -> None:
    """The derivative of every backward here.  Raises NotImplementedError."""
    raise NotImplementedError(
        "k-NN attention has no second derivative: its backward was itself differentiated (create_graph=True, a "
        "gradient penalty, a Hessian). Leave the site dense (topk=None, or exclude) for second derivatives"
    )


def without_tangents(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd's kernel of an operator, with an error for dual tensors before it, whose tangent it would lose."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                    no_forward_mode(None)
        return kernel(*args, **kwargs)

    return run


def no_forward_mode(ctx: Any) -> None:
    """The forward-mode derivative of every operator here.  Raises NotImplementedError."""
    raise NotImplementedError(
        "k-NN attention has no forward-mode derivative (torch.func.jvp, jacfwd, hessian). Use torch.func.vjp, grad or "
        "jacrev, or leave the site dense (topk=None, or exclude)"
    )


# ---- under torch.func ------------------------------------------------------------------------------------------------


def _attention(a: AttentionArguments) -> Any:
    rest = (a.score, a.weight, a.topk, list(a.sizes or ()), a.dropout_p, a.seed, a.lowering, a.tolerance)
    return _Attention.apply(a.q, a.k, a.v, *rest, *_last(a), *(a.captured or ()))  # type: ignore[no-untyped-call]


def _last(a: AttentionArguments) -> tuple[Any, ...]:
    """What forward and backward both end with."""
    return a.draw, a.select, None if a.grid is None else list(a.grid), a.prefix


def _attention_backward(a: BackwardArguments) -> Any:
    rest = (a.score, a.weight, a.topk, list(a.sizes or ()), a.dropout_p, a.lowering, _last(a))
    tensors = (a.grad_out, a.q, a.k, a.v, a.seed, a.out, a.logsumexp, a.threshold, *(a.captured or ()))
    dq, dk, dv, *dcaptured = _AttentionBackward.apply(rest, list(a.needs_grad), *tensors)  # type: ignore[no-untyped-call]
    return dq, dk, dv, dcaptured


def _topk_softmax(a: SoftmaxArguments) -> Any:
    return _TopkSoftmax.apply(a.scores, a.dim, a.topk, a.dtype, a.lowering, a.tolerance)  # type: ignore[no-untyped-call]


def _topk_softmax_backward(a: SoftmaxBackwardArguments) -> Any:
    return _TopkSoftmaxBackward.apply(a.grad, a.weights, a.dim, a.input_dtype, a.lowering)  # type: ignore[no-untyped-call]


UNDER_TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "topk_softmax": _topk_softmax,
    "topk_softmax_backward": _topk_softmax_backward,
}
"""Each operator's way under torch.func, from the record of its arguments."""
