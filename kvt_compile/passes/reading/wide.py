"""Scores that the model goes on with in float64, of a product in a narrower type.

t.double() + timestamps64 - 1.7e9          needs the digits that a kernel in float32 does not have
t.double() * 0.125,  where(m, t64, -inf)   is as good in float32
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvt_compile.passes.canonical.values import Value, is_number

_SCALES = frozenset({"identity", "neg", "abs", "relu", "mul", "div", "dropout"})
_CHOOSES = frozenset({"where", "maximum", "minimum", "clamp", "lt", "le", "gt", "ge", "eq", "ne"})


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
        others = (x for x in value.operands if x.dtype is torch.float64 and x not in scores)
        return any(not is_number(x) and x.name not in ("constant", "fill") for x in others)
    return True
