"""Operations on elements -> the form of what they compute: one rule for each, in the table at the end.

sigmoid(x)  ->  (1 + exp(-x))**-1        where(m, x, 0)  ->  x * m        expm1(x)  ->  exp(x) - 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kvt_compile.passes.canonical.algebra.forms import (
    ONE,
    Chosen,
    Entry,
    Exp,
    Form,
    Terms,
    Total,
    not_negative,
    of_atom,
    over,
    plus,
    product_of,
    program_of,
    times,
    to_power,
)
from kvt_compile.passes.canonical.algebra.row import OPAQUE, POINTWISE, Row, Rule, aligned
from kvt_compile.passes.canonical.coords import Coords
from kvt_compile.passes.canonical.values import Value

LN2 = math.log(2.0)


def _power(row: Row, x: Form, power: Any) -> Form | None:
    """Only of what cannot be negative: a power of it is then exp of a multiple of its logarithm."""
    real = isinstance(power, int | float) and not isinstance(power, bool)
    return to_power(x, float(power)) if real and (not_negative(x) or x.is_number) else None


def _sum(row: Row, value: Value, at: Coords, x: Form, y: Form) -> Form:
    found = plus(x, y, 1.0 if row.along(at) else row.keys)  # sum(exp(s) - 1) + n
    if any(isinstance(atom, Terms) for atom in found.atoms):
        return replace(found, program=(Entry(1.0, "log", value, ()),))  # placed by `_placed`
    return replace(found, program=program_of(found))


def _placed(rule: Rule) -> Rule:
    def placed(row: Row, value: Value, at: Coords) -> Form | None:
        found = rule(row, value, at)
        if found is None or found.program is None:
            return found
        program = tuple(replace(e, at=at) if e.value is value and not e.at else e for e in found.program)
        return replace(found, program=program)

    return placed


def _add(row: Row, value: Value, at: Coords) -> Form | None:
    x, y = row.inputs(value, at)
    return _sum(row, value, at, x, y)


def _sub(row: Row, value: Value, at: Coords) -> Form | None:
    x, y = row.inputs(value, at)
    return _sum(row, value, at, x, times(Form(-1.0), y))


def _div(row: Row, value: Value, at: Coords) -> Form | None:
    x, y = row.inputs(value, at)
    return over(x, y)


def _where(row: Row, value: Value, at: Coords) -> Form | None:
    """where(m, x, 0) is x times the mask."""
    return chosen(row, value, at, row.form)


def chosen(row: Row, value: Value, at: Coords, form_of: Callable[[Any, Coords], Form]) -> Form | None:
    """A `where` of which one side's form is 0: the other's, times the mask.  form_of: of an element, or of its exp."""
    condition, *sides = value.inputs
    if not isinstance(condition, Value):
        return None
    forms = [form_of(x, aligned(at, x)) for x in sides]
    zeros = [form.number == 0 for form in forms]
    if zeros.count(True) != 1:
        return None
    on = zeros[1]
    return times(forms[0 if on else 1], mask(row, condition, at, on))


def mask(row: Row, condition: Value, at: Coords, on: bool) -> Form:
    while condition.kind == "pointwise" and condition.name == "logical_not" and isinstance(condition.inputs[0], Value):
        condition, on = condition.inputs[0], not on
    place = row.space.resolve_all(aligned(at, condition))
    return of_atom(Chosen(row.same.get(condition, condition), place, on), (Entry(1.0, "mask", condition, place, on),))


def _identity(row: Row, value: Value, at: Coords) -> Form | None:
    x = value.inputs[0]
    if isinstance(x, Value) and x.dtype is torch.bool:
        return mask(row, x, at, True)
    if isinstance(x, Value) and (x.dtype is None or not x.dtype.is_floating_point):
        return None
    return row.operand(value, at, 0)


def _sigmoid(row: Row, value: Value, at: Coords) -> Form | None:
    inverse = to_power(row.exponent_of(value, at), -1.0)
    found = None if inverse is None else over(ONE, plus(ONE, inverse))
    return None if found is None else replace(found, program=(Entry(1.0, "log", value, at),))


def _tanh(row: Row, value: Value, at: Coords) -> Form | None:
    squared = to_power(row.exponent_of(value, at), 2.0)
    if squared is None:
        return None
    return over(plus(squared, Form(-1.0)), plus(squared, ONE))


def _abs(row: Row, value: Value, at: Coords) -> Form | None:
    x = row.operand(value, at, 0)
    return x if not_negative(x) else None


def _clamp(row: Row, value: Value, at: Coords) -> Form | None:
    """A lower bound that the sum of a row is never below: exp(s - max(s)) sums to at least 1."""
    x, (_, low, high) = row.operand(value, at, 0), value.inputs
    if high != math.inf or not is_number(low):
        return None
    if value.attrs.get("guard"):
        return x
    if x.is_number:
        return x if x.number >= low else None
    totals = [atom for atom, power in x.powers if isinstance(atom, Total) and power == 1.0]
    largest = [atom for atom, power in x.powers if isinstance(atom, Exp) and power == -1.0]
    if low > x.number or len(totals) != 1 or len(largest) != 1 or len(x.powers) != 2:
        return None
    return x if row.largest_of(largest[0]) == totals[0].form else None


def _fn(*powers: tuple[float, float]) -> Rule:
    """A sum of multiples of powers of exp(x): cosh(x) is 0.5*exp(x) + 0.5*exp(-x)."""

    def rule(row: Row, value: Value, at: Coords) -> Form | None:
        x = next(iter(value.operands), None)
        if x is None or len(x.shape) != len(value.shape):
            return None
        base, total = row.exponent(x, at), Form(0.0)
        for number, power in powers:
            term = to_power(base, power) if power else ONE
            if term is None:
                return None
            total = plus(total, times(Form(number), term))
        return replace(total, program=(Entry(1.0, "log", value, at),))

    return rule


_RULES: dict[str, Rule] = {
    "identity": _identity,
    "constant": lambda row, value, at: Form(float(value.inputs[0])) if is_number(value.inputs[0]) else None,
    "fill": lambda row, value, at: Form(float(value.inputs[0])) if is_number(value.inputs[0]) else None,
    "exp": lambda row, value, at: row.exponent_of(value, at),
    "exp2": lambda row, value, at: to_power(row.exponent_of(value, at), LN2),
    "power_of_number": lambda row, value, at: to_power(row.exponent_of(value, at, 1), math.log(value.inputs[0])),
    "mul": lambda row, value, at: product_of(row.inputs(value, at)),
    "div": _div,
    "reciprocal": lambda row, value, at: over(ONE, row.operand(value, at, 0)),
    "neg": lambda row, value, at: times(Form(-1.0), row.operand(value, at, 0)),
    "sqrt": lambda row, value, at: _power(row, row.operand(value, at, 0), 0.5),
    "rsqrt": lambda row, value, at: _power(row, row.operand(value, at, 0), -0.5),
    "square": lambda row, value, at: _power(row, row.operand(value, at, 0), 2.0),
    "pow": lambda row, value, at: _power(row, row.operand(value, at, 0), value.inputs[1]),
    "add": _placed(_add),
    "sub": _placed(_sub),
    "where": _where,
    "abs": _abs,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "clamp": _clamp,
}


def _opaque_power(row: Row, value: Value, at: Coords) -> Form | None:
    """pow of a number that has no meaning as scores: e**1.0."""
    call, operands = value.attrs.get("call"), list(value.operands)
    if call is None or len(operands) != 1 or len(call.args) != 2 or not is_number(call.args[1]):
        return None
    return _power(row, row.form(operands[0], at), call.args[1])


_OF_OPAQUE: dict[str, Rule] = {
    "pow": _opaque_power,
    "expm1": _fn((1.0, 1.0), (-1.0, 0.0)),
    "cosh": _fn((0.5, 1.0), (0.5, -1.0)),
    "sinh": _fn((0.5, 1.0), (-0.5, -1.0)),
    "ones": lambda row, value, at: ONE,
}


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


POINTWISE.update(_RULES)
OPAQUE.update(_OF_OPAQUE)
