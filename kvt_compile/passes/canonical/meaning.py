"""Canonical name -> what the operation means, as a Value: the table, and the builder that meanings are written with.

One small function or table line per operation, in meaning_pointwise, meaning_layout, meaning_contraction and
meaning_softmax:

    matmul(a, b)   ->  contraction with labels        masked_fill(x, m, v)  ->  pointwise where(m, v, x)
    x.transpose()  ->  layout permute                 anything else         ->  opaque (see canonicalise)

A meaning returns None when it does not hold for these arguments (an integer division, a third einsum operand):
the value is then opaque, which is always safe.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.values import Dim, Kind, Value, dim_of, made_of_sizes, meta_value

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
        if self.dtype is not None and self.dtype.is_floating_point:
            inputs = tuple(map(sized, inputs))
        if any(isinstance(x, fx.Node | torch.Tensor | complex) or x is None for x in inputs):
            return None
        return self.value("pointwise", name, inputs, fn=fn, **attrs)


def sized(x: Any) -> Any:
    """An argument of an operation on real numbers; a node that computes a number of sizes, as the number's value."""
    return (made_of_sizes(x) or x) if isinstance(x, fx.Node) else x


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


def number(x: Any) -> sympy.Expr:
    """A Python scalar as a number of the score language that is no whole number, whatever it is written as."""
    if isinstance(x, sympy.Expr):
        return x
    if math.isinf(x):
        return sympy.oo if x > 0 else -sympy.oo
    if x == 0 and math.copysign(1.0, x) < 0:
        return score.neg(score.zero)
    return sympy.Float(float(x))
