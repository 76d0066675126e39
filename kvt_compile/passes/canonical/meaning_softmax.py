"""Reductions, and what computes a softmax: by name, by hand, or inside scaled_dot_product_attention.

exp(y) / exp(y).sum(dim, keepdim=True)  ->  softmax(y, dim)        softmax(y - max(y))  ->  softmax(y)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvt_compile.passes.canonical.meaning import MEANINGS, Builder, Meaning, axis, is_float, meaning
from kvt_compile.passes.canonical.values import Value


@meaning("softmax")
def _softmax(b: Builder, input: Value, dim: Any = None, dtype: Any = None, **ignored: Any) -> Value | None:
    rank = len(input.shape)
    if dim is None:  # what torch takes then, with a warning that it is deprecated
        dim = 0 if rank in (0, 1, 3) else 1
    number_ = axis(dim, rank)
    if number_ is None:
        return None
    return b.value("softmax", "softmax", (_without_row_maximum(input, (number_,)),), dim=number_)


def _reduce(name: str) -> Meaning:
    def build(b: Builder, input: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value | None:
        listed = range(len(input.shape)) if dim is None else dim if isinstance(dim, list | tuple) else [dim]
        dims = [axis(d, len(input.shape)) for d in listed]
        if any(d is None for d in dims):
            return None
        if (
            name == "sum"
            and not keepdim
            and (product_ := _sum_of_product(b, input, [d for d in dims if d is not None]))
        ):
            return product_
        return b.value("reduce", name, (input,), dims=tuple(dims), keepdim=keepdim)

    return build


MEANINGS.update({name: _reduce(name) for name in ("sum", "amax", "amin", "mean", "logsumexp")})


@meaning("max")
def _largest(b: Builder, input: Value) -> Value | None:
    return b.value("reduce", "amax", (input,), dims=tuple(range(len(input.shape))), keepdim=False)


def _sum_of_product(b: Builder, x: Value, dims: list[int]) -> Value | None:
    """(a * b).sum(dims) -> contraction of a with b."""
    if x.kind != "pointwise" or x.name != "mul" or not all(isinstance(y, Value) and is_float(y) for y in x.inputs):
        return None
    rank = len(x.shape)

    def labels(y: Value) -> tuple[int | None, ...]:
        first = rank - len(y.shape)
        return tuple(None if size == 1 and x.shape[first + d] != 1 else first + d for d, size in enumerate(y.shape))

    left, right = (labels(y) for y in x.inputs)
    if not all(d in left and d in right for d in dims):
        return None
    out = tuple(d for d in range(rank) if d not in dims)
    return b.value("contraction", "mul_sum", x.inputs, lhs=left, rhs=right, out=out)


def softmax_by_hand(b: Builder, x: Any, total: Any) -> Value | None:
    """exp(y) / exp(y).sum(dim, keepdim=True) -> softmax(y), and y - max(y) -> y inside it."""
    while isinstance(total, Value) and total.kind == "pointwise" and total.name == "identity":
        total = total.inputs[0]
    reshaped = isinstance(total, Value) and total.kind == "layout" and total.name == "reshape"
    rows = total.inputs[0] if reshaped else total
    if not (
        isinstance(rows, Value) and rows.kind == "reduce" and rows.name == "sum" and rows.attrs["keepdim"] != reshaped
    ):
        return None
    dims = rows.attrs["dims"]
    if not isinstance(x, Value) or total.shape != tuple(1 if d in dims else n for d, n in enumerate(x.shape)):
        return None
    total = rows
    if total.inputs[0] is not x or len(dims) != 1 or not (x.kind == "pointwise" and x.name == "exp"):
        return None
    return b.value("softmax", "softmax", (_without_row_maximum(x.inputs[0], dims),), dim=dims[0])


def _without_row_maximum(y: Value, dims: tuple[int, ...]) -> Value:
    """softmax(y - m) = softmax(y) for any m constant along the row."""
    if y.kind == "pointwise" and y.name == "sub" and len(y.inputs) == 2:
        left, right = y.inputs
        maximum = right
        while isinstance(maximum, Value) and maximum.name in ("identity", "detach") and maximum.inputs:
            maximum = maximum.inputs[0]
        if (
            isinstance(left, Value)
            and isinstance(maximum, Value)
            and maximum.kind == "reduce"
            and maximum.name == "amax"
            and maximum.attrs["keepdim"]
            and maximum.attrs["dims"] == dims
            and left in (maximum.inputs[0], *_before_border(maximum.inputs[0]))
        ):
            return left
    return y


@meaning("scaled_dot_product_attention")
def _sdpa(
    b: Builder,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: Value | float = 0.0,
    is_causal: bool = False,
    *,
    scale: Value | float | None = None,
    enable_gqa: bool = False,
) -> Value | None:
    if any(isinstance(x, fx.Node) for x in (attn_mask, dropout_p, is_causal, scale, enable_gqa)):
        return None
    return b.value(
        "sdpa", "scaled_dot_product_attention", (query, key, value, attn_mask, scale),
        dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa,
    )  # fmt: skip


def _before_border(value: Value) -> tuple[Value, ...]:
    """What a maximum that was taken without grad is a maximum of."""
    return value.inputs if value.kind == "border" else ()
