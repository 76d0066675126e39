"""Factors of scores: which leave their order as it is, and which of these certainly leave something of the scores.

0.125      exp(log_scale) of a parameter      clamp(min=0.01)      softplus(t) + 0.1

A tensor that is nowhere negative may still be 0: a gate that is closed, a head's share of a softmax with a mask in it.
All scores are equal then, and no order is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.constants import as_number, constant_of, is_parameter

_LEARNED = frozenset({"exp", "exp2", "softplus", "power_of_number"})
"""Ways in which models learn a temperature: of a parameter they are taken to be of usual size, as no model learns a
temperature of 0.  A sigmoid or a softmax is a gate, which may be closed."""
_IF_ALL = frozenset({"mul", "div", "add", "identity", "sqrt", "rsqrt", "reciprocal", "maximum"})
_NOT_NEGATIVE = frozenset({"abs", "square", "relu", "sigmoid", "softplus", "exp", "exp2", "softmax", "power_of_number"})
_FAR = 32
"""What a model that moves a parameter as far wants of it is no temperature: exp(p - 200)."""
_DEEP = 12
"""As many operations above a number are looked through."""

_LEAST = 2.0**-64
_LEAST_OF = {torch.float16: 2.0**-8}
"""Between this and its inverse a factor leaves scores of any usual size what they are: smaller ones make them equal,
larger ones infinite."""


def least_of(dtype: torch.dtype | None) -> float:
    """The smallest factor that leaves something of scores of a dtype."""
    return _LEAST if dtype is None else _LEAST_OF.get(dtype, _LEAST)


def positive(x: Any) -> bool:
    """Whether a number is larger than 0 and finite, or every element of a value is nowhere negative."""
    known = _known(x)
    if known is not None:
        return 0 < known < math.inf
    return isinstance(x, Value) and (at_least(x) >= 0 or lasting(x, x.dtype))


def lasting(x: Any, dtype: torch.dtype | None, deep: int = _DEEP) -> bool:
    """Whether something is certainly left of scores that are multiplied with it, or divided by it."""
    known = _known(x)
    if known is not None or not isinstance(x, Value):
        return bounded([(known or 0.0, dtype)])
    if not deep or at_least(x) > least_of(dtype):
        return bool(deep)
    if x.kind in ("layout", "border"):
        return lasting(x.inputs[0], dtype, deep - 1)
    if x.kind == "pointwise" and x.name == "clamp":
        _, low, high = x.inputs
        some = lasting(low, dtype) or lasting(x.inputs[0], dtype, deep - 1)
        return some and (high == math.inf or lasting(high, dtype))
    if x.name in _LEARNED and x.kind in ("pointwise", "opaque"):
        return learned(x)
    return x.kind == "pointwise" and x.name in _IF_ALL and all(lasting(y, dtype, deep - 1) for y in x.inputs)


def bounded(factors: Iterable[tuple[float, torch.dtype | None]]) -> bool:
    """Whether numbers that are multiplied with, each in a dtype, leave scores what they are: together, and any some."""
    up, down, least = 1.0, 1.0, _LEAST
    for number, dtype in factors:
        up, down, least = up * max(number, 1.0), down * min(number, 1.0), max(least, least_of(dtype))
    return least < down and up < 1 / least


def _known(x: Any) -> float | None:
    known = constant_of(x) if isinstance(x, Value) else x
    return float(known) if isinstance(known, int | float) else None


def learned(x: Value) -> bool:
    """Whether it is made of the model's parameters and usual numbers alone, and masks nothing."""
    queue, seen, any_at_all = [x], {x}, False
    while queue:
        value = queue.pop()
        known = constant_of(value)
        numbers = [abs(y) for y in (*value.inputs, known) if isinstance(y, int | float)]
        if value.name in ("where", "log") or any(y > _FAR and (y < math.inf or value.name != "clamp") for y in numbers):
            return False
        if known is not None:
            continue
        if not any(value.operands):
            if not is_parameter(value):
                return False
            any_at_all = True
        new = [y for y in value.operands if y not in seen]
        seen.update(new)
        queue += new
    return any_at_all


def at_least(x: Any, deep: int = _DEEP) -> float:
    """A number that no element of a value is certainly below, -inf where none is known."""
    known = _known(x)
    if known is not None:
        return known
    if not isinstance(x, Value) or not deep or x.dtype is None or not x.dtype.is_floating_point:
        return -math.inf
    if x.kind in ("layout", "border") or (x.kind == "reduce" and x.name in ("amax", "amin", "mean")):
        return at_least(x.inputs[0], deep - 1)
    found = _least_element(x, [at_least(y, deep - 1) for y in x.inputs]) if x.kind == "pointwise" else -math.inf
    if found < 0 and x.name in _NOT_NEGATIVE and x.kind in ("pointwise", "opaque", "softmax"):
        return 0.0
    as_held = as_number(x.dtype, found)
    return -math.inf if as_held is None or math.isnan(as_held) else float(as_held)


def _least_element(x: Value, least: list[float]) -> float:
    """The same for a pointwise operation, of what its operands are at least."""
    none_negative = all(y >= 0 for y in least)
    match x.name:
        case "identity" | "relu" | "abs":
            return least[0]
        case "add":
            return least[0] + least[1]
        case "maximum":
            return max(least)
        case "minimum":
            return min(least)
        case "clamp":
            return min(max(least[0], least[1]), least[2])
        case "mul" if none_negative:
            return least[0] * least[1]
        case "sqrt" if none_negative:
            return math.sqrt(least[0])
        case "div" if none_negative and (number := _known(x.inputs[1])) is not None and number > 0:
            return least[0] / number
        case "exp":
            return math.exp(min(least[0], 700.0))
        case "sigmoid":
            return 1 / (1 + math.exp(min(-least[0], 700.0)))
    return -math.inf
