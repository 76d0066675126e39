"""Canonical name -> what the operation means, as a Value.  One small function or table line per operation.

    matmul(a, b)   ->  contraction with labels        masked_fill(x, m, v)  ->  pointwise where(m, v, x)
    x.transpose()  ->  layout permute                 anything else         ->  opaque (see canonicalise)

A meaning returns None when it does not hold for these arguments (an integer division, a third einsum operand):
the value is then opaque, which is always safe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from kvt_compile.kernels.language import score

from kvt_compile.passes.canonical.values import Dim, Kind, Value, dim_of, meta_value

Meaning = Callable[..., Value | None]
MEANINGS: dict[str, Meaning] = {}

# keyword arguments that do not change which number stands where
_IRRELEVANT = frozenset(
    {
        "_stacklevel",
        "memory_format",
        "non_blocking",
        "copy",
        "device",
        "layout",
        "pin_memory",
        "half_to_float",
        "out_dtype",
    }
)


def meaning(*names: str) -> Callable[[Meaning], Meaning]:
    """Registers the function as the meaning of these canonical names."""

    def register(function: Meaning) -> Meaning:
        MEANINGS.update(dict.fromkeys(names, function))
        return function

    return register


@lru_cache(maxsize=512)
def _signature(function: Meaning) -> inspect.Signature:
    return inspect.signature(function)


@dataclass
class Builder:
    """Makes the Values of one node.  `shape` and `dtype` are those of the node's own result."""

    node: fx.Node
    shape: tuple[Dim, ...]
    dtype: torch.dtype | None
    modules: dict[str, torch.nn.Module]

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | None:
        """The meaning of a call, or None when there is none for these arguments."""
        function = MEANINGS.get(name)
        if function is None:
            return None
        relevant = {key: value for key, value in kwargs.items() if key not in _IRRELEVANT}
        if relevant.pop("out", None) is not None:
            return None
        signature = _signature(function)
        try:
            bound = signature.bind(self, *args, **relevant)
        except TypeError:
            return None
        for name, value in bound.arguments.items():  # `x: Value` in a meaning asks for a tensor of the graph
            if signature.parameters[name].annotation == "Value" and not isinstance(value, Value):
                return None
        return function(*bound.args, **bound.kwargs)

    def value(
        self, kind: Kind, name: str, inputs: tuple[Any, ...], shape: tuple[Dim, ...] | None = None, **attrs: Any
    ) -> Value:
        return Value(kind, name, self.node, self.shape if shape is None else shape, self.dtype, inputs, attrs)

    def layout(self, name: str, x: Value, shape: tuple[Dim, ...], **attrs: Any) -> Value:
        """A layout step; it keeps the dtype of what it moves."""
        return Value("layout", name, self.node, shape, x.dtype, (x,), attrs)

    def pointwise(self, name: str, fn: Callable[..., sympy.Expr], *inputs: Any, **attrs: Any) -> Value | None:
        if any(isinstance(x, fx.Node | torch.Tensor | complex) or x is None for x in inputs):
            return None
        return self.value("pointwise", name, inputs, fn=fn, **attrs)


def integer(x: Any) -> int | None:
    """An int argument, or the known value of a node that holds one; None when it is dynamic."""
    if isinstance(x, fx.Node):
        x = meta_value(x)
    if isinstance(x, torch.SymInt):
        size = dim_of(x)
        return size if isinstance(size, int) else None
    return int(x) if isinstance(x, int) and not isinstance(x, bool) else None


def axis(x: Any, rank: int) -> int | None:
    """A dimension argument as 0 <= axis < rank."""
    number = integer(x)
    return None if number is None or not -rank <= number < max(rank, 1) else number % max(rank, 1)


def is_float(x: Any) -> bool:
    return isinstance(x, Value) and x.dtype is not None and x.dtype.is_floating_point


def is_bool(x: Any) -> bool:
    return (isinstance(x, Value) and x.dtype is torch.bool) or isinstance(x, bool)


# ---- pointwise -----------------------------------------------------------------------------------------------------

_FLOAT_FUNCTIONS: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "neg": lambda x: -x,
    "exp": score.exp,
    "log": score.log,
    "sqrt": score.sqrt,
    "rsqrt": lambda x: 1 / score.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x**2,
    "sin": score.sin,
    "cos": score.cos,
    "tanh": score.tanh,
    "sigmoid": score.sigmoid,
    "erf": score.erf,
    "abs": score.abs_,
    "relu": score.relu,
    "silu": lambda x: x * score.sigmoid(x),
    "exp2": lambda x: score.exp(0.6931471805599453 * x),
    "relu6": lambda x: score.clamp(x, score.zero, sympy.Float(6.0)),
}
_COMPARISONS = {name: getattr(score, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
_LOGIC = {"logical_and": score.logical_and, "logical_or": score.logical_or}


def _one(name: str, fn: Callable[[sympy.Expr], sympy.Expr]) -> Meaning:
    return lambda b, input: b.pointwise(name, fn, input)


def _two(name: str, fn: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Meaning:
    return lambda b, input, other: b.pointwise(name, fn, input, other)


MEANINGS.update({name: _one(name, fn) for name, fn in _FLOAT_FUNCTIONS.items()})
MEANINGS.update({name: _two(name, fn) for name, fn in _COMPARISONS.items()})
MEANINGS["mul"] = _two("mul", lambda x, y: x * y)
MEANINGS["maximum"] = _two("maximum", score.maximum)
MEANINGS["minimum"] = _two("minimum", score.minimum)


def _logic(name: str, fn: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Meaning:
    return lambda b, input, other: b.pointwise(name, fn, input, other) if is_bool(input) and is_bool(other) else None


MEANINGS.update({name: _logic(name, fn) for name, fn in _LOGIC.items()})


@meaning("logical_not")
def _logical_not(b: Builder, input: Value) -> Value | None:
    return b.pointwise("logical_not", score.logical_not, input) if is_bool(input) else None


@meaning("add")
def _add(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value | None:
    if b.dtype is torch.bool:
        return None
    return b.pointwise("add", lambda x, y, a=1: x + a * y, input, other, *(() if alpha == 1 else (alpha,)))


@meaning("sub")
def _sub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value | None:
    return b.pointwise("sub", lambda x, y, a=1: x - a * y, input, other, *(() if alpha == 1 else (alpha,)))


@meaning("rsub")
def _rsub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value | None:
    return _sub(b, other, input, alpha)


@meaning("div")
def _div(b: Builder, input: Any, other: Any, rounding_mode: str | None = None) -> Value | None:
    if rounding_mode is not None:
        return None
    by_hand = _softmax_by_hand(b, input, other)
    return by_hand or b.pointwise("div", lambda x, y: x / y, input, other)


@meaning("pow")
def _pow(b: Builder, input: Any, exponent: Any) -> Value | None:
    known = isinstance(exponent, int | float) and exponent in (2, 3, 0.5, -1, -0.5)
    return b.pointwise("pow", lambda x, y: x**y, input, exponent) if known else None


@meaning("clamp")
def _clamp(b: Builder, input: Value, min: Any = None, max: Any = None) -> Value | None:
    low, high = (-sympy.oo if min is None else min), (sympy.oo if max is None else max)
    if isinstance(low, Value | fx.Node) or isinstance(high, Value | fx.Node):
        return None
    return b.pointwise("clamp", lambda x: score.clamp(x, number(low), number(high)), input)


@meaning("clamp_min")
def _clamp_min(b: Builder, input: Value, min: Any) -> Value | None:
    return _clamp(b, input, min=min)


@meaning("clamp_max")
def _clamp_max(b: Builder, input: Value, max: Any) -> Value | None:
    return _clamp(b, input, max=max)


@meaning("where")
def _where(b: Builder, condition: Value, input: Any, other: Any) -> Value | None:
    return b.pointwise("where", score.where, condition, input, other) if is_bool(condition) else None


@meaning("masked_fill")
def _masked_fill(b: Builder, input: Value, mask: Value, value: Any) -> Value | None:
    return b.pointwise("where", score.where, mask, value, input) if is_bool(mask) else None


@meaning("lerp")
def _lerp(b: Builder, input: Any, end: Any, weight: Any) -> Value | None:
    return b.pointwise("lerp", lambda x, y, w: x + w * (y - x), input, end, weight)


def number(x: Any) -> sympy.Expr:
    """A Python scalar as a float of the score language (an int must not become an exact fraction)."""
    if isinstance(x, sympy.Expr):
        return x
    if isinstance(x, float) and x in (float("inf"), float("-inf")):
        return sympy.oo if x > 0 else -sympy.oo
    return sympy.Float(float(x))


# ---- a number everywhere: what it is made like gives a shape and no element ------------------------------------------


def _everywhere(value: float) -> Meaning:
    return lambda b, input, *size, **more: _constant(b, value)


MEANINGS.update({f"{name}_like": _everywhere(value) for name, value in (("zeros", 0.0), ("ones", 1.0))})
MEANINGS.update({f"new_{name}": _everywhere(value) for name, value in (("zeros", 0.0), ("ones", 1.0))})


@meaning("full_like")
def _full_like(b: Builder, input: Value, fill_value: Any, **ignored: Any) -> Value | None:
    return _constant(b, fill_value)


@meaning("new_full")
def _new_full(b: Builder, input: Value, size: Any, fill_value: Any, **ignored: Any) -> Value | None:
    return _constant(b, fill_value)


def _constant(b: Builder, value: Any) -> Value | None:
    if b.dtype is None or not b.dtype.is_floating_point or isinstance(value, bool | complex):
        return None
    return b.pointwise("constant", lambda x: x, value)


# ---- the same numbers ----------------------------------------------------------------------------------------------


@meaning("identity")
def _identity(b: Builder, input: Value, *ignored: Any) -> Value | None:
    return b.pointwise("identity", lambda x: x, input)


@meaning("item", "_local_scalar_dense")
def _item(b: Builder, input: Value) -> Value | None:
    """The number in a tensor that the caller feeds.  It has no gradient, so a tensor that has one is not the same."""
    constant = input.kind == "source" and not getattr(meta_value(input.node), "requires_grad", False)
    return b.layout("reshape", input, ()) if constant and is_float(input) else None


@meaning("to", "type", "float", "half", "bfloat16", "double", "type_as", "_autocast_to_full_precision")
def _cast(b: Builder, input: Value, *ignored: Any, **more: Any) -> Value | None:
    """A cast between floating types is rounding, which the kernel does without; a cast to int changes the value."""
    if b.dtype is None or input.dtype is None:
        return None
    if b.dtype == input.dtype or b.dtype.is_floating_point:
        return b.pointwise("identity", lambda x: x, input)
    return None


@meaning("copy")
def _copy(b: Builder, input: Value, src: Value) -> Value | None:
    """x.copy_(src): from now on x holds src."""
    return b.pointwise("identity", lambda x: x, src) if is_float(input) == is_float(src) else None


@meaning("fill")
def _fill(b: Builder, input: Value, value: Any) -> Value | None:
    return b.pointwise("fill", lambda x: x, value)


@meaning("zero")
def _zero(b: Builder, input: Value) -> Value | None:
    return _fill(b, input, 0.0)


@meaning("dropout")
def _dropout(b: Builder, input: Value, p: float = 0.5, training: bool = True, module: str = "") -> Value | None:
    if training is False and not module:
        return _identity(b, input)
    if isinstance(p, Value | fx.Node) or isinstance(training, fx.Node):
        return None
    if (p == 0.0 or not training) and not (module and p > 0.0):
        return _identity(b, input)
    return b.value("pointwise", "dropout", (input,), p=p, module=module)


# ---- reductions and softmax ----------------------------------------------------------------------------------------


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


def _softmax_by_hand(b: Builder, x: Any, total: Any) -> Value | None:
    """exp(y) / exp(y).sum(dim, keepdim=True) -> softmax(y), and y - max(y) -> y inside it."""
    while isinstance(total, Value) and total.kind == "pointwise" and total.name == "identity":
        total = total.inputs[0]
    reshaped = isinstance(total, Value) and total.kind == "layout" and total.name == "reshape"
    rows = total.inputs[0] if reshaped else total
    if not (isinstance(rows, Value) and rows.kind == "reduce" and rows.name == "sum" and rows.attrs["keepdim"] != reshaped):
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
            and maximum.inputs[0] is left
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
