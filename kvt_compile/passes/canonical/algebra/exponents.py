"""Operations on exponents -> the form of exp of what they compute.

exp(x - c)  ->  exp(x) * exp(c)**-1      exp(0.5*x)  ->  exp(x)**0.5      exp(where(m, x, -inf))  ->  exp(x) * m
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvt_compile.passes.canonical.algebra.forms import (
    ONE,
    Atom,
    Exp,
    Form,
    Total,
    not_negative,
    over,
    plus,
    times,
    to_power,
)
from kvt_compile.passes.canonical.algebra.row import EXPONENTS, OPAQUE_EXPONENTS, Row, Rule, aligned
from kvt_compile.passes.canonical.algebra.rules import chosen, is_number
from kvt_compile.passes.canonical.coords import Coords
from kvt_compile.passes.canonical.shifts import is_own
from kvt_compile.passes.canonical.values import Value, broadcasts


def _joined(row: Row, x: Form, y: Form) -> Form | None:
    """exp(x + y); None where something would cancel, which rounds in the model what it meets.  What is taken of the row
    itself is of the size of its scores: max + log(sum(exp(s - max))) loses nothing."""
    cancel = [atom for atom, power in x.powers if power * y.power_of(atom) < 0]
    if cancel:
        rows = [atom.form for atom in (*x.atoms, *y.atoms) if isinstance(atom, Total)]
        rows += [replace(form, powers=frozenset(p for p in form.powers if row.atom_along(p[0]))) for form in (x, y)]
        if not all(any(_is_of(row, atom, scores) for scores in rows) for atom in cancel):
            return None
    return times(x, y)


def _is_of(row: Row, atom: Atom, scores: Form) -> bool:
    """Whether an atom is the sum of a row of exponentials, or exp of another number of that row that is of its size."""
    form = atom.form if isinstance(atom, Total) else row.largest_of(atom)
    if form is not None and form.powers == scores.powers:
        return True
    if not isinstance(atom, Exp) or not isinstance(atom.of, Value):
        return False
    elements = [(x.of, x.at) for x in scores.atoms if isinstance(x, Exp) and isinstance(x.of, Value)]
    return any(is_own(row.space, row.row, (atom.of, atom.at), place) for place in elements)


def _added(sign: float) -> Rule:
    def rule(row: Row, value: Value, at: Coords) -> Form | None:
        x, y = (row.exponent(z, aligned(at, z)) for z in value.inputs)
        other = to_power(y, sign)
        return None if other is None else _joined(row, x, other)

    return rule


def _multiplied(row: Row, value: Value, at: Coords) -> Form | None:
    for n, number in enumerate(value.inputs):
        if is_number(number) and number != 0 and math.isfinite(number):
            if value.name == "div" and n == 0:
                return None
            power = 1.0 / number if value.name == "div" else number
            return to_power(row.exponent_of(value, at, 1 - n), power)
    return None


def _chosen_exponent(row: Row, value: Value, at: Coords) -> Form | None:
    """exp(where(m, x, -inf)) is exp(x) times the mask."""
    return chosen(row, value, at, row.exponent)


def _log(row: Row, value: Value, at: Coords) -> Form | None:
    x = row.operand(value, at, 0)
    return x if not_negative(x) else None


_RULES: dict[str, Rule] = {
    "identity": lambda row, value, at: row.exponent_of(value, at) if isinstance(value.inputs[0], Value) else None,
    "neg": lambda row, value, at: to_power(row.exponent_of(value, at), -1.0),
    "add": _added(1.0),
    "biased": _added(1.0),
    "sub": _added(-1.0),
    "mul": _multiplied,
    "div": _multiplied,
    "where": _chosen_exponent,
    "log": _log,
}


def _softplus(row: Row, value: Value, at: Coords) -> Form | None:
    call = value.attrs.get("call")
    plain = call is not None and len(call.args) + len(call.kwargs) == 1
    return plus(ONE, row.exponent_of(value, at)) if plain else None


def _logsigmoid(row: Row, value: Value, at: Coords) -> Form | None:
    inverse = to_power(row.exponent_of(value, at), -1.0)
    return None if inverse is None else over(ONE, plus(ONE, inverse))


def _logaddexp(row: Row, value: Value, at: Coords) -> Form | None:
    operands = list(value.operands)
    if len(operands) != 2 or not all(broadcasts(x.shape, value.shape) for x in operands):
        return None
    x, y = (row.exponent(z, aligned(at, z)) for z in operands)
    return plus(x, y)


_OF_OPAQUE: dict[str, Rule] = {
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "log_sigmoid": _logsigmoid,
    "logaddexp": _logaddexp,
}


EXPONENTS.update(_RULES)
OPAQUE_EXPONENTS.update(_OF_OPAQUE)
