"""The normal form of what is computed along a row: a number times powers of atoms.

    exp(x - m) / sum_j exp(x - m)   ->   exp(x) * sum_j(exp(x))**-1
    1 - sigmoid(x)                  ->   exp(-x) * (1 + exp(-x))**-1
    exp(x) / (1 + sum_j exp(x))     ->   exp(x) * (1 + sum_j(exp(x)))**-1

Two values with one form are equal for every input for which both are numbers.  A form also carries its *program*: the
model's own values whose exponentials, elements and masks were multiplied, so that what the form proves can be computed
by the operations of the model, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from kvt_compile.passes.canonical.coords import Coords
from kvt_compile.passes.canonical.values import Value


@dataclass(frozen=True)
class Exp:
    """exp of an element, or of a number that the model adds to exponents."""

    of: Value | float
    at: Coords = ()


@dataclass(frozen=True)
class Element:
    """An element as it is."""

    of: Value
    at: Coords


@dataclass(frozen=True)
class Chosen:
    """1 where an element of a mask is `on`, else 0."""

    of: Value
    at: Coords
    on: bool


@dataclass(frozen=True)
class Total:
    """The sum of a form along the row."""

    form: Form


@dataclass(frozen=True)
class Terms:
    """The sum of several forms."""

    forms: frozenset[Form]


Atom: TypeAlias = Exp | Element | Chosen | Total | Terms


@dataclass(frozen=True)
class Entry:
    """One part of a program: power * value is added to the exponent ("exp"), power * log(value) is ("log"), or the
    element is left out unless the mask is `on` ("mask")."""

    power: float
    kind: Literal["exp", "log", "mask"]
    value: Value
    at: Coords
    on: bool = True


Program: TypeAlias = tuple[Entry, ...] | None
"""None where no value of the model says what a form says."""


@dataclass(frozen=True)
class Form:
    number: float
    powers: frozenset[tuple[Atom, float]] = frozenset()
    program: Program = field(default=(), compare=False, hash=False)

    def power_of(self, atom: Atom) -> float:
        return next((power for other, power in self.powers if other == atom), 0.0)

    @property
    def atoms(self) -> list[Atom]:
        return [atom for atom, _ in self.powers]

    @property
    def is_number(self) -> bool:
        return not self.powers


ONE = Form(1.0)
_MOST_TERMS = 12


class NotRead(Exception):  # noqa: N818 - an outcome of the search, not an error
    """No form says what is computed."""


class TooLong(NotRead):
    """More than anybody writes to normalise a row."""


class RoundedAway(NotRead):
    """A term cancels that is so large that it rounds what is left."""


def of_atom(atom: Atom, program: Program = ()) -> Form:
    return Form(1.0, frozenset({(atom, 1.0)}), program)


def rounded(x: float) -> float:
    """Powers and numbers are compared to 12 digits: 2**(s*log2(e)) is exp(s)."""
    return float(f"{x:.12g}")


def _added(x: float, y: float) -> float:
    """x + y, and 0 where that is only what rounding left of it: 0.1 + 0.2 - 0.3."""
    return 0.0 if abs(x + y) <= 1e-12 * max(abs(x), abs(y)) else x + y


def _form(number: float, powers: dict[Atom, float], program: Program) -> Form:
    kept = {atom: rounded(power) for atom, power in powers.items() if power}
    for atom, power in kept.items():
        if isinstance(atom, Chosen) and power > 0:
            kept[atom] = 1.0  # a mask twice is the mask
    return Form(rounded(number), frozenset(kept.items()), program)


def times(x: Form, y: Form) -> Form:
    powers = dict(x.powers)
    for atom, power in y.powers:
        powers[atom] = _added(powers.get(atom, 0.0), power)
    known = x.program is not None and y.program is not None
    return _form(x.number * y.number, powers, (*x.program, *y.program) if known else None)  # type: ignore[misc]


def to_power(x: Form, power: float) -> Form | None:
    """x**power; None where a number has no such power."""
    if x.number == 0 or (x.number < 0 and power != int(power)):
        return None
    program: Program = None
    if x.program is not None and (power > 0 or not any(entry.kind == "mask" for entry in x.program)):
        program = tuple(
            entry if entry.kind == "mask" else replace(entry, power=entry.power * power) for entry in x.program
        )
    try:
        return _form(x.number**power, {atom: n * power for atom, n in x.powers}, program)
    except OverflowError:
        return None


def over(x: Form, y: Form) -> Form | None:
    inverse = to_power(y, -1.0)
    return None if inverse is None else times(x, inverse)


def plus(x: Form, y: Form, most: float = 1.0) -> Form:
    """x + y, over the common denominator; one form where terms cancel down to one.  Raises RoundedAway where one
    cancels that may be more than `most` times larger than what is left: e + 1e6 - 1e6 is not e."""
    if x.number == 0:
        return y
    if y.number == 0:
        return x
    below: dict[Atom, float] = {
        atom: min(x.power_of(atom), y.power_of(atom), 0.0)
        for atom in (*x.atoms, *y.atoms)
        if isinstance(atom, Terms | Total)
    }
    denominator = _form(1.0, below, ())
    collected: dict[frozenset[tuple[Atom, float]], float] = {}
    lost = 0.0
    for form in (x, y):
        numerator = over(form, denominator)
        assert numerator is not None
        for term in terms_of(numerator):
            before = collected.get(term.powers, 0.0)
            collected[term.powers] = left = _added(before, term.number)
            if before * term.number < 0 and min(abs(before), abs(term.number)) > 4 * abs(left):
                lost = max(lost, min(abs(before), abs(term.number)) * _size(term))
    forms = [Form(rounded(number), powers) for powers, number in collected.items() if number]
    if any(lost > most * abs(form.number) * _size(form, 1.0) for form in forms):
        raise RoundedAway
    if len(forms) > _MOST_TERMS:
        raise TooLong
    if not forms:
        return Form(0.0)
    total = forms[0] if len(forms) == 1 else of_atom(Terms(frozenset(forms)))
    return replace(times(total, denominator), program=None)


def _size(term: Form, unknown: float = math.inf) -> float:
    """How large a term is beside the model's own exponentials and masks, whatever its number."""
    size = 1.0
    for atom, power in term.powers:
        match atom:
            case Exp(float() as x):
                size *= math.exp(max(min(x * power, 300.0), -300.0))
            case Element():
                size *= unknown
    return size


def terms_of(x: Form) -> list[Form]:
    """The form as a sum: its one factor that is a sum is multiplied out."""
    inner = next((atom for atom, power in x.powers if isinstance(atom, Terms) and power == 1.0), None)
    if not isinstance(inner, Terms):
        return [x]
    rest = over(x, of_atom(inner))
    assert rest is not None
    return [times(rest, term) for term in inner.forms]


def positive(x: Form) -> bool:
    """Whether it is above 0 wherever it is a number."""
    return x.number > 0 and all(atom_is_positive(atom) for atom in x.atoms)


def atom_is_positive(atom: Atom) -> bool:
    match atom:
        case Exp():
            return True
        case Total(form):
            return positive(form)
        case Terms(forms):
            return all(map(positive, forms))
    return False


def not_negative(x: Form) -> bool:
    """Whether no part of it can be below 0; what is divided by is above it."""
    return x.number > 0 and all(
        atom_is_positive(atom) or (power > 0 and _is_not_negative(atom)) for atom, power in x.powers
    )


_NOT_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "abs", "square", "exp", "exp2", "softmax", "hardsigmoid"})


def _is_not_negative(atom: Atom) -> bool:
    match atom:
        case Chosen():
            return True
        case Total(form):
            return not_negative(form)
        case Terms(forms):
            return all(map(not_negative, forms))
        case Element(of):
            return of.name in _NOT_NEGATIVE or (of.name == "pow" and of.inputs[1:] == (2,))
    return False


def program_of(x: Form) -> Program:
    """The program that the atoms of a form say by themselves."""
    entries: list[Entry] = []
    for atom, power in sorted(x.powers, key=lambda item: _place(item[0])):
        match atom:
            case Exp(Value() as value, at):
                entries.append(Entry(power, "exp", value, at))
            case Element(value, at):
                entries.append(Entry(power, "log", value, at))
            case Chosen(value, at, on) if power > 0:
                entries.append(Entry(1.0, "mask", value, at, on))
            case _:
                return None
    return tuple(entries)


def _place(atom: Atom) -> int:
    return atom.of.index if isinstance(atom, Exp | Element | Chosen) and isinstance(atom.of, Value) else -1


def product_of(forms: Iterable[Form]) -> Form:
    result = ONE
    for form in forms:
        result = times(result, form)
    return result
