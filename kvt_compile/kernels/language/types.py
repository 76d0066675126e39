"""Which type every operation of a score expression is done in: torch's promotion, written down once.

    c0[i] - c1[j]      int64 - int64 -> int64          wraps as torch's does
    0.5*(c0[i] - j)    float * int64 -> real           real: the accumulation type, float32 or float64
    s + c0[h, i, j]    real + float64 -> real          whatever is made of s or p is real

Numbers in the text have no type of their own ("int", "float"): they take that of what they meet.  A captured float16
or bfloat16 element is real as soon as it is read, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch

from kvt_compile.kernels.language import score as language

INT, FLOAT = "int", "float"
"""A whole number, and any other, that stands in the text itself."""
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
"""Types of whole numbers, truth values among them."""
_HALVES = ("float16", "bfloat16")
_IN_REAL = frozenset({"exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf"})
"""Functions that no two programs round alike: always done in the accumulation type."""
_TRUTH = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not"})
_SIGNED_TRUTH = frozenset({"add", "sub", "mul", "neg", "abs", "power", "floordiv", "mod"})
"""Arithmetic of truth values is arithmetic of 0 and 1."""


class TypeMismatchError(ValueError):
    """An operation that has no meaning for the types of its operands."""


class Types:
    """The type of every part of an expression.

    Args:
        real: the accumulation type, "float32" or "float64".
        of_leaf: the dtype of a captured element (a load, or a symbol that stands for one); None where it has none.
    """

    def __init__(self, real: str, of_leaf: Callable[[sympy.Expr], str | None]) -> None:
        self.real = real
        self._of_leaf = of_leaf
        self._known: dict[sympy.Expr, str] = {}

    def __call__(self, x: sympy.Expr) -> str:
        """ "bool", "uint8", ..., "float64", or INT or FLOAT for numbers."""
        if x not in self._known:
            self._known[x] = self._type(x)
        return self._known[x]

    def meets_in(self, x: sympy.Expr) -> str:
        """The type that the operands of an operation are brought to before it (of a where(): its branches)."""
        name = type(x).__name__
        if name in _IN_REAL:
            return self.real
        operands = x.args[1:] if name == "where" else x.args
        met = self.common(operands, language.holds(x))
        if name == "div" and met not in ("float32", "float64"):
            return self.real
        if name == "power" and met in (INT, *INTEGERS) and not is_whole_power(x):
            return self.real
        return "int64" if name in _SIGNED_TRUTH and met == "bool" else met

    def common(self, operands: Sequence[sympy.Expr], holds: bool = False) -> str:
        """What values promote to when they meet; `holds`: the operation is made of s or p."""
        types = [self(x) for x in operands]
        if holds and any(t not in INTEGERS for t in types):
            return self.real
        return promote(types, self.real)

    def _type(self, x: sympy.Expr) -> str:
        leaf = self._of_leaf(x)
        if leaf is not None:
            return self.real if leaf in _HALVES else leaf
        if x in language.VALUES:
            return self.real
        if isinstance(x, sympy.Integer):
            return INT
        if language.is_number(x):
            return FLOAT
        if language.is_index(x):
            return "int64"
        name = type(x).__name__
        if isinstance(x, language.Operation):
            return self._of_operation(name, x)
        # arithmetic inside the brackets of a load
        types = [self(y) for y in x.args]
        return "int64" if x.args and all(t in INTEGERS or t == INT for t in types) else self.real

    def _of_operation(self, name: str, x: sympy.Expr) -> str:
        if name in language.CASTS:
            return self._of_cast(name, x)
        if name in _TRUTH:
            return "bool"
        met = self.meets_in(x)
        return self.real if met == FLOAT and language.holds(x) else met

    def _of_cast(self, name: str, x: sympy.Expr) -> str:
        given = self(x.args[0])
        if name in INTEGERS and given not in INTEGERS and given != INT:
            raise TypeMismatchError(f"{name}(...) of a real number: only whole numbers are cast to whole numbers")
        return self.real if name not in INTEGERS and language.holds(x) else name


@lru_cache(maxsize=4096)
def _promoted(types: tuple[str, ...], real: str) -> str:
    typed = [getattr(torch, t) for t in types if t not in (INT, FLOAT)]
    if not typed:
        return FLOAT if FLOAT in types else INT
    met = typed[0]
    for dtype in typed[1:]:
        met = torch.promote_types(met, dtype)
    if met.is_floating_point:
        return str(met).removeprefix("torch.")
    if FLOAT in types:
        return real
    return "int64" if met == torch.bool and INT in types else str(met).removeprefix("torch.")


def promote(types: Sequence[str], real: str) -> str:
    """The type in which values of these types meet."""
    return _promoted(tuple(sorted(set(types))), real)


def is_whole_power(x: sympy.Expr) -> bool:
    """x ** 0, 1, 2, ...: a whole number of whole numbers."""
    return isinstance(x.args[1], sympy.Integer) and bool(x.args[1] >= 0)


def of_captured(dtypes: Sequence[str]) -> Callable[[sympy.Expr], str | None]:
    """The dtypes of captured tensors as `Types` asks for them."""

    def of_leaf(x: Any) -> str | None:
        return dtypes[x.slot] if isinstance(x, language.load) else None

    return of_leaf
