"""Operations on captured tensors that a kernel repeats bit for bit, and how they are written in the score language.

    t[:, None] - t[None]    int64               ->   c0[i] - c1[j]
    0.1 * (that)            float32             ->   0.1*(c0[i] - c1[j])
    that.exp()              no two alike        ->   stays in the graph: the kernel reads its result

Exactly rounded arithmetic of float32, float64 and whole numbers is repeated; float16 and bfloat16 are only chosen,
compared and negated.  Everything else is computed by the model as it wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.types import FLOAT, INT, INTEGERS, Types
from kvt_compile.passes.canonical.meaning import number
from kvt_compile.passes.canonical.values import Value, is_number, meta_value

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "square", "pow"})
_CHOICES = frozenset(
    {"neg", "abs", "relu", "relu6", "hardtanh", "maximum", "minimum", "clamp", "where", "identity", "constant", "fill"}
)
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_LOGIC = frozenset({"logical_and", "logical_or", "logical_not"})
_HALVES = (torch.float16, torch.bfloat16)
_KNOWN = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_HALVES, torch.float32, torch.float64}
)


def is_exact(value: Value) -> bool:
    """Whether the kernel can compute a pointwise value of captured tensors with the very bits that torch gives it."""
    if is_number(value) or value.name in _LOGIC:
        return True  # a number of the graph is nothing that a kernel could be given: there is nothing else to do
    if not {value.dtype, *(x.dtype for x in value.operands)} <= _KNOWN:
        return False
    met = meeting(value)
    operands = _operands(value)
    if not all(_fits(x, met) for x in operands if not isinstance(x, Value)):
        return False
    if met in _HALVES and any(x.dtype is not met for x in operands if isinstance(x, Value)):
        return False  # a whole number is rounded to it
    if value.name in _COMPARISONS:
        return True
    if value.name in _ARITHMETIC:
        return met not in (*_HALVES, torch.bool) and not _rounds_apart(value)
    if value.name == "identity" and value.dtype is not None:
        return _widens(met, value.dtype)
    return value.name in _CHOICES and value.dtype is met and (met is not torch.bool or value.name == "where")


def _widens(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a kernel casts as torch does."""
    if given is wanted:
        return True
    if wanted.is_floating_point:
        return wanted not in _HALVES
    return wanted is not torch.bool and not given.is_floating_point


def _rounds_apart(value: Value) -> bool:
    """Division by a number, or by a tensor of no dimension, is on a GPU torch's product with its reciprocal."""
    divisor = value.inputs[-1]
    if value.name != "div" or (isinstance(divisor, Value) and divisor.shape):
        return False
    device = getattr(meta_value(value.node), "device", None)
    exact = not isinstance(divisor, Value) and math.frexp(abs(float(divisor)))[0] == 0.5
    return (device is None or device.type != "cpu") and not exact


def _operands(value: Value) -> tuple[Any, ...]:
    return value.inputs[1:] if value.name == "where" else value.inputs


def _fits(x: Any, dtype: torch.dtype) -> bool:
    """Whether torch reads a Python number in this type as the number it is, or rounds it as a kernel does."""
    if isinstance(x, sympy.Expr) or x != x:
        return False
    if dtype is torch.bool:
        return False
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return isinstance(x, int) and info.min <= x <= info.max
    if isinstance(x, int) and abs(x) >= 2**53:
        return False
    return dtype not in _HALVES or float(torch.tensor(float(x), dtype=dtype)) == float(x)


def meeting(value: Value) -> torch.dtype:
    """The type in which torch lets the operands of a pointwise operation meet."""
    operands = [_like(x) for x in _operands(value)]
    if len(operands) == 1:
        first = operands[0]
        if isinstance(first, torch.Tensor):
            return first.dtype
        return value.dtype or torch.float32
    met: torch.dtype = torch.result_type(*operands[:2])
    for x in operands[2:]:  # numbers, as of a clamp
        met = torch.result_type(torch.empty((1,), dtype=met, device="meta"), x)
    if value.name == "div" and not met.is_floating_point:
        return value.dtype or torch.float32
    return met


def _like(x: Any) -> Any:
    if not isinstance(x, Value):
        return x
    if is_number(x):
        return 1.0
    return torch.empty((1,) * len(x.shape), dtype=x.dtype, device="meta")


def written(value: Value, arguments: Sequence[sympy.Expr], types: Types) -> sympy.Expr | None:
    """An exact value in the score language, with a cast wherever the language would let operands meet in another type
    than torch; None where that cannot be said.  `arguments`: one expression for each of its inputs."""
    if value.name in _LOGIC:
        return value.attrs["fn"](*arguments)
    if (number_ := _folded(value, arguments)) is not None:
        return number_
    met, skipped = meeting(value), 1 if value.name == "where" else 0
    condition, operands = list(arguments[:skipped]), list(arguments[skipped:])
    name = _name(met)
    expression = value.attrs["fn"](*condition, *operands)
    if value.name not in _AS_IT_IS and met not in _HALVES and types.meets_in(expression) not in (name, FLOAT, INT):
        if name not in language.CASTS:
            return None
        operands = [x if language.is_number(x) or types(x) == name else language.cast(name, x) for x in operands]
        expression = value.attrs["fn"](*condition, *operands)
    return expression if value.name in _COMPARISONS else _in_type(expression, value.dtype, types)


_FOLDS = ("add", "sub", "mul", "div", "neg", "abs")


def _folded(value: Value, arguments: Sequence[sympy.Expr]) -> sympy.Expr | None:
    """Arithmetic of numbers alone, done by torch in the value's own type."""
    if value.name not in _FOLDS or value.dtype not in (torch.float32, torch.float64):
        return None
    if not all(map(language.is_number, arguments)):
        return None
    numbers = (torch.tensor(float(x), dtype=value.dtype) for x in arguments)
    result = float(getattr(torch, value.name)(*numbers))
    return None if result != result else number(result)


_AS_IT_IS = ("identity", "constant", "fill")


def _in_type(x: sympy.Expr, dtype: torch.dtype | None, types: Types) -> sympy.Expr | None:
    found = types(x)
    if dtype is None or found == _name(dtype) or (dtype in _HALVES and found == types.real):
        return x
    whole = found == INT or found in INTEGERS
    if found in (FLOAT, INT) and whole != dtype.is_floating_point and all(map(_is_plain, x.atoms(sympy.Float))):
        return x
    if dtype in _HALVES or _name(dtype) not in language.CASTS or (not whole and not dtype.is_floating_point):
        return None
    if found == FLOAT:  # numbers that float32 would round
        return x.xreplace({y: language.cast(_name(dtype), y) for y in x.atoms(sympy.Float)})
    return language.cast(_name(dtype), x)


def _is_plain(x: sympy.Float) -> bool:
    return float(torch.tensor(float(x), dtype=torch.float32)) == float(x)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number_in(x: Any, dtype: torch.dtype) -> sympy.Expr:
    """A Python number as torch reads it where it meets this type."""
    return number(x) if dtype.is_floating_point else sympy.Integer(int(x))
