"""kvt::attention as a torch.autograd.Function, for transforms of torch.func (grad, vjp, per-sample gradients).

The operator has the same derivative by `register_autograd`, but an operator registered that way refuses them
("must override the setup_context staticmethod").  Everyone else calls the operator, which costs less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ARGUMENTS = 11  # before the captured tensors


class Attention(torch.autograd.Function):
    """apply(q, k, v, score, weight, topk, sizes, dropout_p, seed, lowering, tolerance, *captured) ->
    out, logsumexp, threshold."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        captured = list(rest[_ARGUMENTS - 3 :])
        return torch.ops.kvt.attention(q, k, v, captured, *rest[: _ARGUMENTS - 3])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, score, weight, topk, sizes, dropout_p, seed, lowering, _tolerance, *captured = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, seed, *output, *captured)
        ctx.rest = (score, weight, topk, sizes, dropout_p, lowering)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seed, *saved = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[_ARGUMENTS:]]
        gradients = _Backward.apply(ctx.rest, needs_grad, grad_out, q, k, v, seed, *saved)  # type: ignore[no-untyped-call]
        gradients = [dx if need else None for dx, need in zip(gradients, needs_grad, strict=True)]
        return (*gradients[:3], *[None] * (_ARGUMENTS - 3), *gradients[3:])


class _Backward(torch.autograd.Function):
    """The operator's backward; differentiated (into an error) under torch.func, which always creates the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rest: tuple[Any, ...], needs_grad: list[bool], *tensors: Any) -> tuple[Tensor, ...]:
        score, weight, topk, sizes, dropout_p, lowering = rest
        grad_out, q, k, v, seed, out, logsumexp, threshold, *captured = tensors
        dq, dk, dv, dcaptured = torch.ops.kvt.attention_backward(
            grad_out, q, k, v, captured, out, logsumexp, threshold,
            score, weight, topk, sizes, dropout_p, seed, needs_grad, lowering,
        )  # fmt: skip
        return (dq, dk, dv, *dcaptured)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        no_second_derivative(ctx)


def no_second_derivative(ctx: Any, *_: Any) -> None:
    """The derivative of every backward here.  Raises NotImplementedError."""
    raise NotImplementedError(
        "k-NN attention has no second derivative: its backward was itself differentiated (create_graph=True, a "
        "gradient penalty, a Hessian). Leave the site dense (topk=None, or exclude) for second derivatives"
    )
