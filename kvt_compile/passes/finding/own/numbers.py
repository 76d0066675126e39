"""Numbers that a model makes of numbers, as torch computes them: in the dtypes of its tensors.

mask - 1    of the uint8 0: 255        1 - mask    of float32        mask + mask    of bool: True
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from kvt_compile.passes.canonical.values import Value

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": abs, "log": torch.log, "ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt,
    "eq": operator.eq, "ne": operator.ne, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "logical_not": torch.logical_not, "maximum": torch.maximum, "minimum": torch.minimum, "identity": lambda x: x,
}  # fmt: skip


def computed(value: Value, numbers: list[float | bool]) -> float | bool | None:
    """What a pointwise value is where its inputs are these numbers; None where torch makes no such number of them."""
    if value.name not in _OPERATIONS or value.dtype is None:
        return None
    try:
        found = _OPERATIONS[value.name](*map(_as_input, value.inputs, numbers))
        if value.name == "identity":
            found = found.to(value.dtype)
    except (RuntimeError, TypeError, OverflowError):
        return None
    whole = isinstance(found, torch.Tensor) and found.dtype == value.dtype
    number: float | bool = found.item() if whole else False
    return number if whole else None


def _as_input(x: Any, number: float | bool) -> Any:
    """A number as the operand that holds it: a tensor of its dtype and rank, which decides about the result's dtype."""
    if not isinstance(x, Value) or x.dtype is None:
        return number
    return torch.tensor(number, dtype=x.dtype, device="cpu").reshape((1,) * len(x.shape))
