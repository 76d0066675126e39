"""Reductions, and what computes a softmax by name, or inside scaled_dot_product_attention.

softmax(y - max(y))  ->  softmax(y)        softmin(y)  ->  softmax(-y)        log_softmax(y)  ->  y - logsumexp(y)

What computes one by other operations is read by algebra (`algebra/`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.made import made
from kvt_compile.passes.canonical.meaning import MEANINGS, Builder, Meaning, axis, is_bool, is_float, meaning, sized
from kvt_compile.passes.canonical.spellings import MASKED
from kvt_compile.passes.canonical.values import Value


def _axis(dim: Any, rank: int) -> int | None:
    """The axis of a softmax; without one what torch takes then, with a warning that it is deprecated."""
    return axis((0 if rank in (0, 1, 3) else 1) if dim is None else dim, rank)


@meaning("softmax")
def _softmax(b: Builder, input: Value, dim: Any = None, dtype: Any = None, **ignored: Any) -> Value | None:
    along = _axis(dim, len(input.shape))
    if along is None:
        return None
    return b.value("softmax", "softmax", (_without_row_maximum(input, (along,)),), dim=along)


@meaning("softmin")
def _softmin(b: Builder, input: Value, dim: Any = None, dtype: Any = None, **ignored: Any) -> Value | None:
    if input.kind == "pointwise" and input.name == "neg":
        return _softmax(b, input.inputs[0], dim)
    negative = b.pointwise("neg", score.neg, input)
    return None if negative is None else _softmax(b, made(negative), dim)


@meaning("log_softmax")
def _log_softmax(b: Builder, input: Value, dim: Any = None, dtype: Any = None, **ignored: Any) -> Value | None:
    along = _axis(dim, len(input.shape))
    if along is None:
        return None
    shape = tuple(1 if d == along else size for d, size in enumerate(b.shape))
    total = b.value("reduce", "logsumexp", (input,), shape, dims=(along,), keepdim=True)
    return b.pointwise("sub", score.sub, input, total)


def _of_masked(name: str) -> Meaning:
    """torch.masked.softmax(x, dim, mask=m) is softmax(where(m, x, -inf), dim)."""

    def build(b: Builder, input: Value, dim: Any, dtype: Any = None, mask: Any = None) -> Value | None:
        if mask is None:
            return MEANINGS[name](b, input, dim)
        if not isinstance(mask, Value) or not is_bool(mask):
            return None
        low = -math.inf if name != "softmin" else math.inf
        attrs = {"fn": score.where}
        chosen = made(Value("pointwise", "where", b.node, input.shape, input.dtype, (mask, input, low), attrs))
        return MEANINGS[name](b, chosen, dim)

    return build


MEANINGS.update({f"masked_{name}": _of_masked(name) for name in MASKED})


@meaning("normalize")
def _normalize(b: Builder, input: Value, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, **ignored: Any) -> Value | None:
    """F.normalize(x, p=1): x over the sum of its sizes, which torch keeps above `eps`.  The usual one only guards from
    a division by 0; any larger one is a floor."""
    total = _norm(b, input, p, dim, True)
    if total is None or not isinstance(eps, int | float):
        return None
    guarded = b.value("pointwise", "clamp", (total, eps, math.inf), total.shape, fn=score.clamp, guard=eps <= 1e-12)
    return b.pointwise("div", score.div, input, guarded)


@meaning("norm", "vector_norm", "linalg_vector_norm", "linalg_norm")
def _norm(b: Builder, input: Value, p: Any = 2.0, dim: Any = None, keepdim: bool = False, dtype: Any = None,
          ord: Any = None) -> Value | None:  # fmt: skip
    """Of the first order along one dimension: the sum of the sizes.  Others stay what they are."""
    listed = dim if isinstance(dim, list | tuple) else [dim]
    along = axis(listed[0], len(input.shape)) if len(listed) == 1 and listed[0] is not None else None
    order = p if ord is None else ord
    if along is None or isinstance(order, bool | str | Value | fx.Node) or order != 1 or not is_float(input):
        return None
    kept = [size for d, size in enumerate(input.shape) if d != along]
    shape = (*kept[:along], 1, *kept[along:]) if keepdim else tuple(kept)
    sizes = b.value("pointwise", "abs", (input,), input.shape, fn=score.abs_)
    return b.value("reduce", "sum", (sizes,), shape, dims=(along,), keepdim=keepdim)


def _reduce(name: str) -> Meaning:
    def build(b: Builder, input: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value | None:
        if is_float(input) and isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            return None  # a sum of whole numbers
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
        return _of_parts(b, name, input, dims) or b.value("reduce", name, (input,), dims=tuple(dims), keepdim=keepdim)

    return build


def _of_parts(b: Builder, name: str, x: Value, dims: list[Any]) -> Value | None:
    """stack([x, y]).sum(0) -> x + y."""
    if name not in ("sum", "mean") or x.kind != "select_by" or x.name != "cat" or dims != [x.attrs["dim"]]:
        return None
    if not all(part.shape[dims[0]] == 1 for part in x.inputs) or not is_float(x):
        return None
    parts = [b.layout("reshape", part, b.shape) for part in x.inputs]
    total = parts[0]
    for part in parts[1:]:
        total = b.value("pointwise", "add", (total, part), fn=score.add)
    return b.value("pointwise", "div", (total, len(parts)), fn=score.div) if name == "mean" else total


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
    scale = sized(scale)
    if any(isinstance(x, fx.Node) for x in (attn_mask, dropout_p, is_causal, scale, enable_gqa)):
        return None
    return b.value(
        "sdpa", "scaled_dot_product_attention", (query, key, value, attn_mask, scale),
        dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa,
    )  # fmt: skip


def _before_border(value: Value) -> tuple[Value, ...]:
    """What a maximum that was taken without grad is a maximum of."""
    return value.inputs if value.kind == "border" else ()
