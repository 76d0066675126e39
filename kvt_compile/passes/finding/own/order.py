"""What scores are strictly increasing functions of, from themselves down.

(s * 0.125 - max).softmax(-1)        softmax, shift, 0.125: of s
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.shifts import is_of_their_size
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.constants import constant_of
from kvt_compile.passes.finding.own.positive import positive
from kvt_compile.passes.finding.own.ranking import through
from kvt_compile.passes.reading.read import aligned

Place = tuple[Value, Coords]


@dataclass(frozen=True)
class Function:
    """A strictly increasing function of the scores of a row: times a factor, less the row's own maximum, or their
    softmax."""

    kind: Literal["factor", "shift", "softmax"]
    factor: float | Value = 1.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Order:
    """An element of a row, and below it what it is a strictly increasing function of: `functions[n]` makes the element
    at `places[n]` of that at `places[n + 1]`."""

    places: tuple[Place, ...]
    functions: tuple[Function, ...]
    product: tuple[Function, ...] = ()
    """Where the last of them is of a product: what the operands of that are multiplied with, whatever the signs."""

    @property
    def of(self) -> Place:
        """The last of them."""
        return self.places[-1]


def below(space: Space, value: Value, coords: Coords) -> Place:
    """The element below all rearrangements."""
    while value.kind == "layout" and (pulled := PULL[value.name](space, value, coords)) is not None:
        value, coords = value.inputs[0], pulled
    return value, space.resolve_all(coords)


def exactly(space: Space, value: Value, coords: Coords) -> Place:
    """The element that has the very same number: below rearrangements, copies and casts that lose nothing."""
    while True:
        value, coords = below(space, value, coords)
        inner = through(value) or _widened(value)
        if inner is None:
            return value, coords
        value = inner


def ordered_by(space: Space, value: Value, coords: Coords, along: Coord) -> Order:
    """What an element is a strictly increasing function of, within its row."""
    places, functions = list[Place](), list[Function]()
    while True:
        value, coords = exactly(space, value, coords)
        places.append((value, coords))
        step = _softmax(space, value, coords, along) or _increasing(space, value, coords, along)
        if step is None:
            resolved = tuple((x, space.resolve_all(at)) for x, at in places)
            return Order(resolved, tuple(functions), factors_of_product(value))
        value, function = step
        coords = aligned(coords, value)
        functions.append(function)


def _widened(value: Value) -> Value | None:
    """What was cast to a dtype that holds every number it had."""
    if value.kind != "pointwise" or value.name != "identity" or not isinstance(value.inputs[0], Value):
        return None
    x = value.inputs[0]
    if x.dtype is None or value.dtype is None or not x.dtype.is_floating_point or not value.dtype.is_floating_point:
        return None
    return x if torch.promote_types(x.dtype, value.dtype) == value.dtype else None


def _softmax(space: Space, value: Value, coords: Coords, along: Coord) -> tuple[Value, Function] | None:
    """What it is the softmax of along the row: of all keys, as those that an own k leaves out are equal."""
    if value.kind != "softmax" or "own" in value.attrs or coords[value.attrs["dim"]] != space.resolve(along):
        return None
    return value.inputs[0], Function("softmax")


def _increasing(space: Space, value: Value, coords: Coords, along: Coord) -> tuple[Value, Function] | None:
    """What is multiplied, or has its row's maximum subtracted.  Any other number that is added could make equal what
    was not."""
    if value.kind != "pointwise" or value.name not in ("mul", "div", "sub"):
        return None
    for n, x in enumerate(value.inputs if value.name == "mul" else value.inputs[:1]):
        other = value.inputs[1 - n]
        if not isinstance(x, Value):
            continue
        if value.name == "sub":
            own = isinstance(other, Value) and _is_maximum(space, other, x, aligned(coords, x), along)
            return (x, Function("shift")) if own else None
        if positive(other) and _one_a_row(space, other, coords, along):
            return x, factor_of(value, other)
    return None


def factor_of(value: Value, other: float | Value) -> Function:
    """What `mul` or `div` multiplies with."""
    known = constant_of(other) if isinstance(other, Value) else other
    if known is None:
        return Function("factor", other, value.dtype)
    return Function("factor", 1 / known if value.name == "div" else float(known), value.dtype)


def factors_of_product(product: Value) -> tuple[Function, ...]:
    """The numbers that the operands of a product are multiplied with, without their signs."""
    found: list[Function] = []
    queue = list(product.operands) if product.kind == "contraction" else []
    while queue:
        x = queue.pop()
        if x.kind in ("layout", "border") or through(x) is not None:
            queue.append(next(x.operands))
        elif x.kind == "pointwise" and x.name in ("mul", "div"):
            known = [constant_of(y) if isinstance(y, Value) else y for y in x.inputs]
            n = 1 if known[0] is None else 0
            number = known[n]
            if (
                number
                and isinstance(number, int | float)
                and isinstance(x.inputs[1 - n], Value)
                and (n or x.name == "mul")
            ):
                found.append(Function("factor", abs(1 / number if x.name == "div" else number), x.dtype))
                queue.append(x.inputs[1 - n])
    return tuple(found)


def _one_a_row(space: Space, other: float | Value, coords: Coords, along: Coord) -> bool:
    if not isinstance(other, Value) or constant_of(other) is not None:
        return True
    return not space.atoms_of(aligned(coords, other)) & space.atoms_of([along])


def _is_maximum(space: Space, shift: Value, x: Value, coords: Coords, along: Coord) -> bool:
    """Whether it is the row's own maximum, or as good as that, of these scores, which stand at `coords`."""
    while (inner := through(shift)) is not None:
        shift = inner
    if shift.kind != "reduce" or not is_of_their_size(shift) or len(shift.attrs["dims"]) != 1:
        return False
    (dim,) = shift.attrs["dims"]
    if space.resolve(coords[dim]) != space.resolve(along) or not space.covers(along, x.shape[dim]):
        return False
    of = shift.inputs[0]
    while of is not x and (inner := through(of)) is not None:
        of = inner
    return of is x and bool(shift.attrs["keepdim"])
