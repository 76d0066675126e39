"""Values that hold one number everywhere."""

from __future__ import annotations

import math
from typing import Any

import torch

from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.ranking import argument

CASTS = frozenset({"bool", "to", "type", "long", "int", "byte"})
"""Operations that change the dtype and nothing else."""
_FILLED = {"zeros": 0.0, "ones": 1.0}


def constant_of(value: Value) -> float | bool | None:
    """The number that every element is."""
    if value.kind == "pointwise" and value.name in ("constant", "fill"):
        x = value.inputs[-1]
        return x if isinstance(x, bool | int | float) else None
    if value.kind == "pointwise" and value.name == "identity" and isinstance(value.inputs[0], Value):
        inner = constant_of(value.inputs[0])
        return None if inner is None or value.dtype is None else as_number(value.dtype, inner)
    if value.kind == "layout":
        return constant_of(value.inputs[0])
    if value.kind != "opaque" or value.attrs.get("call") is None:
        return None
    name = value.name.removeprefix("new_").removesuffix("_like")
    if name in _FILLED:
        return bool(_FILLED[name]) if value.dtype is torch.bool else _FILLED[name]
    found: Any = None
    if name == "full":
        found = argument(value, "fill_value", 2 if value.name == "new_full" else 1)
    elif name in ("tensor", "scalar_tensor") and value.shape == ():
        found = argument(value, "data" if name == "tensor" else "s", 0)
    elif name in CASTS and value.inputs:
        found = constant_of(value.inputs[0])
    if not isinstance(found, bool | int | float) or value.dtype is None:
        return None
    return as_number(value.dtype, found)


def as_number(dtype: torch.dtype, x: float | bool) -> float | bool | None:
    """A number as a dtype holds it; None where it cannot."""
    if dtype is torch.bool:
        return bool(x)
    return float(x) if dtype.is_floating_point else int(x) if math.isfinite(x) else None
