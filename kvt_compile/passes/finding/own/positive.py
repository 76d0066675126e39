"""A factor of scores that is nowhere negative leaves their order as it is: which factors certainly are none.

exp(log_scale).clamp(max=100)      softplus(t)      0.125
"""

from __future__ import annotations

import math
from typing import Any

from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.constants import constant_of

_ALWAYS = frozenset({"exp", "exp2", "sigmoid", "softplus", "power_of_number"})
_IF_ALL = frozenset({"mul", "div", "add", "identity", "sqrt", "rsqrt", "reciprocal", "maximum"})


LEAST = 2.0**-64
"""A number between this and its inverse leaves scores of any usual size what they are; smaller ones make them equal."""


def positive(x: Any) -> bool:
    """Whether a number, or every element of a value, is certainly larger than 0 and finite but for overflow."""
    known = constant_of(x) if isinstance(x, Value) else x
    if not isinstance(x, Value) or known is not None:
        return isinstance(known, int | float) and LEAST < known < 1 / LEAST
    if x.kind in ("layout", "border"):
        return positive(x.inputs[0])
    if x.kind == "softmax":
        return True
    if x.kind == "pointwise" and x.name == "clamp":
        _, low, high = x.inputs
        return (positive(low) or positive(x.inputs[0])) and (high == math.inf or positive(high))
    if x.name in _ALWAYS and x.kind in ("pointwise", "opaque"):
        return True
    return x.kind == "pointwise" and x.name in _IF_ALL and all(map(positive, x.inputs))
