"""Pointwise operations: one function of the elements that stand at the same coordinates.

masked_fill(x, m, v)  ->  where(m, v, x)        x.to(bfloat16)  ->  identity        dropout(x, p)  ->  dropout
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.made import made
from kvt_compile.passes.canonical.meaning import MEANINGS, Builder, Meaning, is_bool, is_float, meaning
from kvt_compile.passes.canonical.values import Value, meta_value
from kvt_compile.torch_versions import numbers

_FLOAT_FUNCTIONS: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "neg": score.neg,
    "exp": score.exp,
    "log": score.log,
    "sqrt": score.sqrt,
    "rsqrt": lambda x: score.div(score.one, score.sqrt(x)),
    "reciprocal": lambda x: score.div(score.one, x),
    "square": lambda x: score.power(x, sympy.Integer(2)),
    "sin": score.sin,
    "cos": score.cos,
    "tanh": score.tanh,
    "sigmoid": score.sigmoid,
    "erf": score.erf,
    "abs": score.abs_,
    "relu": score.relu,
    "silu": lambda x: score.mul(x, score.sigmoid(x)),
    "exp2": lambda x: score.exp(score.mul(sympy.Float(0.6931471805599453), x)),
}
_COMPARISONS = {name: getattr(score, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
_LOGIC = {"logical_and": score.logical_and, "logical_or": score.logical_or}


def _one(name: str, fn: Callable[[sympy.Expr], sympy.Expr]) -> Meaning:
    return lambda b, input: b.pointwise(name, fn, input)


def _two(name: str, fn: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Meaning:
    return lambda b, input, other: b.pointwise(name, fn, input, other)


MEANINGS.update({name: _one(name, fn) for name, fn in _FLOAT_FUNCTIONS.items()})
MEANINGS.update({name: _two(name, fn) for name, fn in _COMPARISONS.items()})
MEANINGS["mul"] = _two("mul", score.mul)
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
    return (
        b.pointwise("add", score.add, input, other)
        if alpha == 1
        else b.pointwise("add_scaled", _add_scaled, input, other, alpha)
    )


@meaning("sub")
def _sub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value | None:
    return (
        b.pointwise("sub", score.sub, input, other)
        if alpha == 1
        else b.pointwise("sub_scaled", _sub_scaled, input, other, alpha)
    )


def _add_scaled(x: sympy.Expr, y: sympy.Expr, scale: sympy.Expr) -> sympy.Expr:
    return score.add(x, score.mul(scale, y))


def _sub_scaled(x: sympy.Expr, y: sympy.Expr, scale: sympy.Expr) -> sympy.Expr:
    return score.sub(x, score.mul(scale, y))


@meaning("rsub")
def _rsub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Value | None:
    return _sub(b, other, input, alpha)


@meaning("div")
def _div(b: Builder, input: Any, other: Any, rounding_mode: str | None = None) -> Value | None:
    if rounding_mode is not None:
        return None
    return b.pointwise("div", score.div, input, other)


@meaning("pow", "float_power")
def _pow(b: Builder, input: Any, exponent: Any) -> Value | None:
    if isinstance(exponent, Value):
        return _power_of_number(b, input, exponent)
    known = isinstance(exponent, int | float) and exponent in (2, 3, 0.5, -1, -0.5)
    whole = exponent in (2, 3)  # x * x and x * x * x, as torch computes them
    return (
        b.pointwise("pow", lambda x, y: score.power(x, sympy.Integer(int(y)) if whole else y), input, exponent)
        if known
        else None
    )


@meaning("rpow")
def _power_of_number(b: Builder, base: Any, exponent: Value) -> Value | None:
    """2**x is exp(log(2)*x)."""
    if isinstance(base, Value):
        if base.shape and any(size != 1 for size in base.shape):
            return None
        product = b.value("pointwise", "mul", (_log_of(b, base), exponent), fn=score.mul)
        return b.pointwise("exp", score.exp, made(product)) if is_float(base) and is_float(exponent) else None
    if not isinstance(base, int | float) or isinstance(base, bool) or not 0 < base < math.inf or not is_float(exponent):
        return None
    factor = sympy.Float(math.log(base))
    return b.pointwise("power_of_number", lambda x, y: score.exp(score.mul(factor, y)), base, exponent)


def _log_of(b: Builder, x: Value) -> Value:
    return made(Value("pointwise", "log", b.node, x.shape, x.dtype, (x,), {"fn": score.log}))


_CLAMPED = score.hardtanh if numbers(torch.__version__) >= (2, 14) else score.clamp
"""The same numbers.  At a bound torch's clamp has the whole gradient, and from 2.14 on none."""


@meaning("clamp")
def _clamp(b: Builder, input: Value, min: Any = None, max: Any = None) -> Value | None:
    low, high = (-math.inf if min is None else min), (math.inf if max is None else max)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    if (isinstance(low, Value) or isinstance(high, Value)) and _CLAMPED is not score.clamp:
        return None  # that torch splits a tie with a tensor as bound
    return b.pointwise("clamp", _CLAMPED, input, low, high)


@meaning("hardtanh")
def _hardtanh(b: Builder, input: Value, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Value | None:
    if not isinstance(min_val, int | float) or not isinstance(max_val, int | float):
        return None
    return b.pointwise("hardtanh", score.hardtanh, input, min_val, max_val)


@meaning("relu6")
def _relu6(b: Builder, input: Value) -> Value | None:
    return _hardtanh(b, input, 0.0, 6.0)


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


@meaning("isnan")
def _isnan(b: Builder, input: Value) -> Value | None:
    return b.pointwise("isnan", lambda x: score.ne(x, x), input) if is_float(input) else None


@meaning("nan_to_num")
def _nan_to_num(b: Builder, input: Value, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Value | None:
    """Zeros for NaN, as after a softmax of rows without keys; any other number there stays an operation."""
    if nan not in (None, 0) or input.dtype is None or not input.dtype.is_floating_point:
        return None
    if input.kind == "softmax":  # its weights are at most 1
        return b.pointwise("nan_to_num", lambda x: score.where(score.ne(x, x), score.zero, x), input)
    limits = torch.finfo(input.dtype)
    high, low = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf
    return b.pointwise("nan_to_num", _without_nan, input, high, low)


def _without_nan(x: sympy.Expr, high: sympy.Expr, low: sympy.Expr) -> sympy.Expr:
    finite = score.where(score.eq(x, sympy.oo), high, score.where(score.eq(x, -sympy.oo), low, x))
    return score.where(score.ne(x, x), score.zero, finite)


@meaning("lerp")
def _lerp(b: Builder, input: Any, end: Any, weight: Any) -> Value | None:
    return b.pointwise("lerp", lambda x, y, w: score.add(x, score.mul(w, score.sub(y, x))), input, end, weight)


# ---- a number everywhere: what it is made like gives a shape and no element ------------------------------------------


def _everywhere(value: float) -> Meaning:
    return lambda b, input, *size, **more: constant(b, value)


MEANINGS.update({f"{name}_like": _everywhere(value) for name, value in (("zeros", 0.0), ("ones", 1.0))})
MEANINGS.update({f"new_{name}": _everywhere(value) for name, value in (("zeros", 0.0), ("ones", 1.0))})


MEANINGS["zeros"] = lambda b, *size, **more: constant(b, 0.0)
MEANINGS["ones"] = lambda b, *size, **more: constant(b, 1.0)


@meaning("tensor", "scalar_tensor")
def _number(b: Builder, data: Any, **ignored: Any) -> Value | None:
    """torch.tensor(0.0), torch.tensor([0.0, 0.0])"""
    number = _uniform(data)
    return None if number is None else constant(b, number)


def _uniform(data: Any) -> float | int | None:
    """The number that nested lists consist of; None where they have another or none."""
    if isinstance(data, list | tuple):
        numbers = {str(x): x for x in map(_uniform, data)}  # as texts, which tell 0.0 from -0.0
        return next(iter(numbers.values())) if len(numbers) == 1 else None
    return data if isinstance(data, int | float) and not isinstance(data, bool) else None


@meaning("full")
def _full(b: Builder, size: Any, fill_value: Any, **ignored: Any) -> Value | None:
    return constant(b, fill_value) if isinstance(fill_value, int | float) else None


@meaning("full_like")
def _full_like(b: Builder, input: Value, fill_value: Any, **ignored: Any) -> Value | None:
    return constant(b, fill_value)


@meaning("new_full")
def _new_full(b: Builder, input: Value, size: Any, fill_value: Any, **ignored: Any) -> Value | None:
    return constant(b, fill_value)


def constant(b: Builder, value: Any) -> Value | None:
    """A tensor of one number, or of what a tensor of no dimension holds."""
    if b.dtype is None or b.dtype is torch.bool or b.dtype.is_complex or isinstance(value, bool | complex):
        return None
    if not b.dtype.is_floating_point:
        return b.pointwise("constant", lambda x: x, value) if isinstance(value, int) else None
    if isinstance(value, int | float):  # 0.1 in float32 is another number than in float64
        value = float(torch.tensor(float(value), dtype=b.dtype))
    return b.pointwise("constant", lambda x: x, value)


# ---- the same numbers ----------------------------------------------------------------------------------------------


@meaning("identity")
def _identity(b: Builder, input: Value, *ignored: Any) -> Value | None:
    return b.pointwise("identity", lambda x: x, input)


@meaning("detach")
def _detach(b: Builder, input: Value) -> Value | None:
    """The same where no gradient could come through; else it stays an operation."""
    return _identity(b, input) if input.index >= 0 and not input.attached else None


@meaning("item", "_local_scalar_dense")
def _item(b: Builder, input: Value) -> Value | None:
    """The number in a tensor that the caller feeds.  It has no gradient, so a tensor that has one is not the same."""
    constant = input.kind == "source" and not getattr(meta_value(input.node), "requires_grad", False)
    return b.layout("reshape", input, ()) if constant and is_float(input) else None


@meaning("to", "type", "float", "half", "bfloat16", "double", "type_as", "_autocast_to_full_precision", "long", "int")
def _cast(b: Builder, input: Value, *ignored: Any, **more: Any) -> Value | None:
    """A cast of scores between floating types is rounding, which the kernel does without; one to whole numbers changes
    them."""
    if b.dtype is None or input.dtype is None:
        return None
    whole = not (b.dtype.is_floating_point or b.dtype.is_complex or b.dtype is torch.bool)
    if b.dtype == input.dtype or b.dtype.is_floating_point or (whole and not is_float(input)):
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
