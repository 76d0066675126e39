"""Scores that the model goes on with in float64, of a product in a narrower type.

t.double() + timestamps64 - 1.7e9          needs the digits that a kernel in float32 does not have
t.double() * 0.125,  where(m, t64, -inf)   is as good in float32
t.double() > 0.5                           too, which t.double() > 0.1 is not: 0.1 is another number in float32
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from kvt_compile.passes.canonical.values import Value, is_number

_SCALES = frozenset({"identity", "neg", "abs", "relu", "mul", "div", "dropout"})
_COMPARES = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_CHOOSES = frozenset({"where", "maximum", "minimum", "clamp"}) | _COMPARES


def needs_float64(product: Value, made: Iterable[Value]) -> Value | None:
    """What is computed in float64 of a product in another type, and is more than a scale or a mask."""
    if product.dtype is torch.float64:
        return None
    scores = {product, *made}
    return next((x for x in scores if x is not product and x.kind == "pointwise" and _is_wide(x, scores)), None)


def _is_wide(value: Value, scores: set[Value]) -> bool:
    if value.name in _SCALES or torch.float64 not in (value.dtype, *(x.dtype for x in value.operands)):
        return False
    if value.name in _CHOOSES:
        in_float64 = any(x.dtype is torch.float64 and x.shape for x in value.operands)  # one of no axis is a number
        if value.name in _COMPARES and in_float64 and not all(map(_is_in_float32, value.inputs)):
            return True
        others = (x for x in value.operands if x.dtype is torch.float64 and x not in scores)
        return any(not is_number(x) and x.name not in ("constant", "fill") for x in others)
    return True


def _is_in_float32(x: Any) -> bool:
    """Whether a number, or a tensor of one, is a number of float32 too; what is no number is."""
    if isinstance(x, Value):
        return x.name not in ("constant", "fill") or _is_in_float32(x.inputs[-1])
    return not isinstance(x, int | float) or not math.isfinite(x) or torch.tensor(x, dtype=torch.float32).item() == x
