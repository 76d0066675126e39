"""A value at coordinates -> its `Form` along one row.

    e = exp(s - s.amax(-1, True));  e / e.sum(-1, True)     at [b, h, i, j], the row running over j
      ->  exp(s[b, h, i, j]) * sum_j(exp(s[b, h, i, j]))**-1

The index a sum runs over may have any name: it is given the row's own, and then the same elements are the same atoms
wherever they stand, summed or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kvt_compile.passes.canonical.algebra.forms import (
    ONE,
    Atom,
    Chosen,
    Element,
    Entry,
    Exp,
    Form,
    Program,
    Terms,
    TooLong,
    Total,
    atom_is_positive,
    of_atom,
    over,
    plus,
    product_of,
    program_of,
    terms_of,
    times,
    to_power,
)
from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.shifts import Place, is_own, original, within
from kvt_compile.passes.canonical.values import Value, broadcasts, same

_MOST = 300
"""Elements read for one row; what is longer is not how anybody normalises."""
_FEW = 1e-5
"""The sum of a row and its mean differ by the number of its keys, which is between this and its inverse."""

Rule = Callable[["Row", Value, Coords], Form | None]
"""(row, value, its coordinates) -> the form; None where it stays an element."""
POINTWISE: dict[str, Rule] = {}
OPAQUE: dict[str, Rule] = {}
"""Operations that have no meaning as scores, and yet can be read."""
EXPONENTS: dict[str, Rule] = {}
OPAQUE_EXPONENTS: dict[str, Rule] = {}
"""The same for exp of a value.  All are filled by rules.py and exponents.py."""


class Row:
    """Reads values along one row: the coordinate `row` of a space."""

    def __init__(
        self,
        space: Space,
        row: Coord,
        stops: frozenset[Value] = frozenset(),
        same: Mapping[Value, Value] | None = None,
    ) -> None:
        """stops: values that are elements whatever they are made of.  same: what is computed as an earlier value is."""
        self.space, self.row, self.stops, self.same = space, row, stops, {} if same is None else same
        self._memo: dict[tuple[Value, Coords, bool], Form] = {}

    def read(self) -> set[Value]:
        """Every value that was read so far."""
        return {value for value, _, _ in self._memo}

    # ---- elements ----------------------------------------------------------------------------------------------------

    def form(self, value: Any, at: Coords = ()) -> Form:
        """The form of an element, or of a number."""
        return self._known(value, at, exponent=False)

    def exponent(self, value: Any, at: Coords = ()) -> Form:
        """The form of exp of an element, or of a number."""
        return self._known(value, at, exponent=True)

    def _known(self, value: Any, at: Coords, exponent: bool) -> Form:
        if not isinstance(value, Value):
            return _exp_of_number(float(value)) if exponent else Form(float(value))
        at = self.space.resolve_all(at)
        key = (value, at, exponent)
        if key not in self._memo:
            if len(self._memo) > _MOST:
                raise TooLong
            self._memo[key] = self._exponent(value, at) if exponent else self._form(value, at)
        return self._memo[key]

    def _element(self, value: Value, at: Coords) -> Form:
        first = self.same.get(value, value)
        if value.dtype is torch.bool:
            return of_atom(Chosen(first, at, True), (Entry(1.0, "mask", value, at),))
        return of_atom(Element(first, at), (Entry(1.0, "log", value, at),))

    def _form(self, value: Value, at: Coords) -> Form:
        found: Form | None = None
        if value in self.stops:
            found = None if value.name == "cat" else self._element(value, at)
            if found is None and (place := self._place_in_parts(value, at)) is not None:
                found = self.form(*place)
        elif value.kind == "layout":
            moved = PULL[value.name](self.space, value, at)
            found = None if moved is None else self.form(value.inputs[0], moved)
        elif value.kind == "pointwise":
            rule = POINTWISE.get(value.name)
            if rule is not None and self._follows(value):
                found = rule(self, value, at)
        elif value.kind == "opaque":
            rule = OPAQUE.get(value.name)
            found = None if rule is None else rule(self, value, at)
        elif value.kind == "reduce":
            found = self._reduced(value, at)
        elif value.kind == "contraction":
            found = self._contracted(value, at)
        elif value.kind == "softmax":
            found = self._softmax(value, at)
        elif value.kind == "select_by" and value.name == "cat":
            found = self._part(value, at)
        return self._element(value, at) if found is None else found

    def _follows(self, value: Value) -> bool:
        """Whether its operands stand at known places and it computes with real numbers."""
        real = value.dtype is not None and value.dtype.is_floating_point
        return real and all(broadcasts(x.shape, value.shape) for x in value.operands)

    def inputs(self, value: Value, at: Coords) -> list[Form]:
        """The forms of a pointwise value's operands."""
        return [self.form(x, aligned(at, x)) for x in value.inputs]

    def operand(self, value: Value, at: Coords, n: int) -> Form:
        return self.form(value.inputs[n], aligned(at, value.inputs[n]))

    def exponent_of(self, value: Value, at: Coords, n: int = 0) -> Form:
        return self.exponent(value.inputs[n], aligned(at, value.inputs[n]))

    # ---- exponents ---------------------------------------------------------------------------------------------------

    def _exponent(self, value: Value, at: Coords) -> Form:
        found: Form | None = None
        if value.kind == "layout":
            moved = PULL[value.name](self.space, value, at)
            found = None if moved is None else self.exponent(value.inputs[0], moved)
        elif value.kind == "pointwise":
            rule = EXPONENTS.get(value.name)
            if rule is not None and self._follows(value):
                found = rule(self, value, at)
        elif value.kind == "opaque":
            rule = OPAQUE_EXPONENTS.get(value.name)
            found = None if rule is None else rule(self, value, at)
        elif value.kind == "reduce" and value.name == "logsumexp":
            found = self._reduced(value, at, exponent=True)
        if found is None:
            return of_atom(Exp(self.same.get(value, value), at), (Entry(1.0, "exp", value, at),))
        if value.name == "log":
            return found  # exp(log(x)) is x
        return replace(found, program=self._program_of_exponent(value, at))

    def _program_of_exponent(self, value: Value, at: Coords) -> Program:
        """The exponent as the model has it, without what its own row is shifted by."""
        power = 1.0
        while (left := self._shifted(value, at) or self._scaled(value, at)) is not None:
            value, at, *factor = left
            power *= factor[0] if factor else 1.0
        if not self.along(at) and value.kind == "reduce":
            return ()
        return (Entry(power, "exp", value, at),)

    def _scaled(self, value: Value, at: Coords) -> tuple[Value, Coords, float] | None:
        """x - c and the number of number * (x - c)."""
        if value.kind != "pointwise" or value.name not in ("mul", "div", "neg") or not self._follows(value):
            return None
        *numbers, x = value.inputs if isinstance(value.inputs[-1], Value) else reversed(value.inputs)
        if not isinstance(x, Value) or (value.name == "div" and x is not value.inputs[0]):
            return None
        number = numbers[0] if numbers else -1.0
        place = aligned(at, x)
        if not isinstance(number, int | float) or number == 0 or self._shifted(x, place) is None:
            return None
        return x, place, 1.0 / number if value.name == "div" else float(number)

    def _shifted(self, value: Value, at: Coords) -> tuple[Value, Coords] | None:
        """x of x - c or x + c, where c is one number for each row that x may be without."""
        if value.kind == "layout":
            moved = PULL[value.name](self.space, value, at)
            return None if moved is None or self._shifted(value.inputs[0], moved) is None else (value.inputs[0], moved)
        if value.kind != "pointwise" or not self._follows(value):
            return None
        if value.name == "identity" and isinstance(value.inputs[0], Value):
            inner = value.inputs[0], aligned(at, value.inputs[0])
            return inner if self._shifted(*inner) is not None else None
        if value.name not in ("sub", "add"):
            return None
        for x, c in ((0, 1), (1, 0))[: 1 if value.name == "sub" else 2]:
            kept, shift = value.inputs[x], value.inputs[c]
            if not (isinstance(kept, Value) and isinstance(shift, Value)):
                continue
            kept_at, shift_at = (self.space.resolve_all(aligned(at, y)) for y in (kept, shift))
            if not self.along(kept_at) or self.along(shift_at):
                continue
            if self.is_own((shift, shift_at), (kept, kept_at), 1.0 if value.name == "sub" else -1.0):
                return kept, kept_at
        return None

    def is_own(self, shift: Place, kept: Place, sign: float = 1.0) -> bool:
        """Whether kept - sign * shift is as good as kept along the row: shift is the logarithm of the sum of the row's
        exponentials, however it is written, or what `shifts.py` knows."""
        total, mine = self.total(self.exponent(*kept)), to_power(self.exponent(*shift), sign)
        if total is not None and mine is not None and total.powers == mine.powers:
            return total.number > 0 and _FEW < mine.number / total.number < 1 / _FEW
        if sign < 0:
            place = original(self.space, *shift)
            if place[0].kind != "pointwise" or place[0].name != "neg" or not isinstance(place[0].inputs[0], Value):
                return False
            shift = place[0].inputs[0], place[1]
        return is_own(self.space, self.row, shift, kept)

    def largest_of(self, atom: Atom) -> Form | None:
        """exp of the elements of which an atom is exp of the largest, in its own row."""
        if not isinstance(atom, Exp) or not isinstance(atom.of, Value):
            return None
        reduction, at = original(self.space, atom.of, atom.at)
        if reduction.kind != "reduce" or reduction.name != "amax":
            return None
        inside = within(self.space, reduction, at, self.row)
        return None if inside is None else self.exponent(reduction.inputs[0], inside)

    @property
    def keys(self) -> float:
        """How many elements a row has; as good as none where that is known only at run time."""
        size = self.space.size(self.row)
        return float(size) if isinstance(size, int) else 1.0

    # ---- rows --------------------------------------------------------------------------------------------------------

    def along(self, at: Coords) -> bool:
        """Whether coordinates run along the row."""
        return bool(self.space.atoms_of([self.row]) & self.space.atoms_of(at))

    def atom_along(self, atom: Atom) -> bool:
        match atom:
            case Total():
                return False
            case Terms(forms):
                return any(self.atom_along(inner) for form in forms for inner in form.atoms)
        return self.along(atom.at)

    def bound(self, size: Any, rest: Coords) -> Coord | None:
        """The coordinate for an index of this size that a sum runs over."""
        return self.row if same(self.space.size(self.row), size) and not self.along(rest) else None

    def total(self, x: Form) -> Form | None:
        """The sum along the row: what does not run along it, and is certainly positive, stands before the sum."""
        if x.is_number:
            size = self.space.size(self.row)
            return Form(x.number * size) if isinstance(size, int) else None
        parts = [replace(part, program=program_of(part)) for part in terms_of(x)]
        if len(parts) > 1 and any(not any(map(self.atom_along, part.atoms)) for part in parts):
            total: Form = Form(0.0)
            for part in parts:
                one = self.total(part)
                if one is None:
                    return None
                total = plus(total, one, self.keys)
            return total
        inner = frozenset(p for p in x.powers if self.atom_along(p[0]) or not atom_is_positive(p[0]))
        if not any(self.atom_along(atom) for atom, _ in inner):
            return None
        outer = Form(x.number, x.powers - inner)
        return times(outer, of_atom(Total(Form(1.0, inner, x.program))))

    def _reduced(self, value: Value, at: Coords, exponent: bool = False) -> Form | None:
        dims, x = value.attrs["dims"], value.inputs[0]
        if len(dims) != 1 or value.name not in ("sum", "mean", "logsumexp") or (value.name == "logsumexp") != exponent:
            return None
        if value.dtype is None or not value.dtype.is_floating_point:
            return None  # a sum in whole numbers
        rest = [c for d, c in enumerate(at) if not (value.attrs["keepdim"] and d in dims)]
        bound = self.bound(x.shape[dims[0]], tuple(rest))
        if bound is None:
            return None
        inside = (*rest[: dims[0]], bound, *rest[dims[0] :])
        found = self.total(self.exponent(x, inside) if exponent else self.form(x, inside))
        if found is None or value.name != "mean":
            return found
        size = x.shape[dims[0]]
        return times(found, Form(1.0 / size)) if isinstance(size, int) else None

    def _contracted(self, value: Value, at: Coords) -> Form | None:
        labels = value.attrs["lhs"], value.attrs["rhs"]
        summed = {label for side in labels for label in side if label is not None} - set(value.attrs["out"])
        if len(summed) != 1:
            return None
        (label,) = summed
        size = next(n for x, side in zip(value.inputs, labels, strict=True)
                    for n, y in zip(x.shape, side, strict=True) if y == label)  # fmt: skip
        bound = self.bound(size, at)
        if bound is None or not all(label in side for side in labels):
            return None
        places = {**dict(zip(value.attrs["out"], at, strict=True)), label: bound, None: ZERO}
        operands = [(x, tuple(places[y] for y in side)) for x, side in zip(value.inputs, labels, strict=True)]
        return self.total(product_of(self.form(x, where) for x, where in operands))

    def _softmax(self, value: Value, at: Coords) -> Form | None:
        if at[value.attrs["dim"]] != self.space.resolve(self.row):
            return None
        inner = self.exponent(value.inputs[0], at)
        total = self.total(inner)
        found = None if total is None else over(inner, total)
        return None if found is None else replace(found, program=inner.program)

    def _part(self, value: Value, at: Coords) -> Form | None:
        place = self._place_in_parts(value, at)
        return None if place is None else self.form(*place)

    def _place_in_parts(self, value: Value, at: Coords) -> tuple[Value, Coords] | None:
        dim, start = value.attrs["dim"], 0
        coord = self.space.resolve(at[dim])
        known, size = self.space.known(coord), self.space.size(coord)
        first = known if known is not None else coord.start
        last = known if known is not None else (coord.start + size - 1 if isinstance(size, int) else None)
        if last is None or coord.step != 1:
            return None
        for part in value.inputs:
            if not isinstance(part.shape[dim], int):
                return None
            if start <= first and last < start + part.shape[dim]:
                inside = (
                    self.space.constant(part.shape[dim], known - start)
                    if known is not None
                    else Coord(coord.digits, coord.start - start)
                )
                return part, (*at[:dim], inside, *at[dim + 1 :])
            start += part.shape[dim]
        return None


def aligned(at: Coords, x: Any) -> Coords:
    if not isinstance(x, Value):
        return ()
    tail = at[len(at) - len(x.shape) :]
    return tuple(ZERO if size == 1 else coord for size, coord in zip(x.shape, tail, strict=True))


def _exp_of_number(x: float) -> Form:
    """exp(c) as an atom: what is added and taken away again rounds what it meets, so no two numbers become one."""
    if x == 0:
        return ONE
    if math.isinf(x):
        return Form(0.0) if x < 0 else of_atom(Exp(x), None)
    return Form(1.0, frozenset({(Exp(abs(x)), math.copysign(1.0, x))}))
