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
        return as_number(value.dtype, x) if isinstance(x, bool | int | float) and value.dtype is not None else None
    if value.kind == "pointwise" and value.name == "identity" and isinstance(value.inputs[0], Value):
        inner = constant_of(value.inputs[0])
        return None if inner is None or value.dtype is None else as_number(value.dtype, inner)
    if value.kind == "layout":
        return constant_of(value.inputs[0])
    if value.kind != "opaque" or value.attrs.get("call") is None:
        return None
    name = value.name.removeprefix("new_").removesuffix("_like")
    if name in _FILLED:
        return None if value.dtype is None else as_number(value.dtype, _FILLED[name])
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
    if dtype.is_complex or not (dtype.is_floating_point or math.isfinite(x)):
        return None
    try:
        given = torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None, device="cpu")
        found: float | bool = given.to(dtype).item()
    except (RuntimeError, OverflowError):
        return None
    return found


def is_parameter(value: Value) -> bool:
    """Whether a source is a parameter of the model."""
    module = value.node.graph.owning_module
    if value.kind != "source" or value.origin == "parameter" or value.node.op != "get_attr" or module is None:
        return value.kind == "source" and value.origin == "parameter"
    try:
        module.get_parameter(str(value.node.target))
    except AttributeError:
        return False
    return True
