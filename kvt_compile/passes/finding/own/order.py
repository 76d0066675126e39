"""Which scores have the same k largest in a row as others.

    s        2*s        s - s.amax(-1)        s.softmax(-1)

In real numbers a strictly increasing function keeps the order; in floats it may make equal what was not: s + 1e9 is
the same number all along a row, and most of the softmax of 100*s is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.constants import constant_of
from kvt_compile.passes.finding.own.positive import positive
from kvt_compile.passes.finding.own.ranking import through
from kvt_compile.passes.reading.invariance import is_of_the_scores_size
from kvt_compile.passes.reading.read import aligned

Place = tuple[Value, Coords]


@dataclass(frozen=True)
class Order:
    """The order of an element in its row: that of `of`, which it is an increasing function of."""

    of: Place
    number: float
    """What it is multiplied with on the way, numbers alone."""
    tensors: tuple[Value, ...]
    """The other factors."""
    softmax: bool
    """Whether a softmax is on the way: scores far below a row's largest are equal behind it."""

    def is_as_fine_as(self, scores: Order) -> bool:
        """Whether the k largest of this order are those of scores that a softmax follows: what a softmax made equal
        here has no weight there, if they are multiplied with no less."""
        if self.of != scores.of:
            return False
        return not self.softmax or (self.tensors == scores.tensors and self.number <= scores.number)


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
    """What an element is a strictly increasing function of, within its row: behind copies, positive factors, the
    row's own maximum, and a softmax."""
    number, tensors, softmax = 1.0, list[Value](), False
    while True:
        value, coords = exactly(space, value, coords)
        if value.kind == "softmax" and coords[value.attrs["dim"]] == space.resolve(along):
            value, number, tensors, softmax = value.inputs[0], 1.0, [], True
            continue
        step = _increasing(space, value, coords, along)
        if step is None:
            return Order((value, coords), number, tuple(tensors), softmax)
        value, factor = step
        coords = aligned(coords, value)
        if isinstance(factor, Value):
            tensors.append(factor)
        else:
            number *= factor


def _widened(value: Value) -> Value | None:
    """What was cast to a dtype that holds every number it had."""
    if value.kind != "pointwise" or value.name != "identity" or not isinstance(value.inputs[0], Value):
        return None
    x = value.inputs[0]
    if x.dtype is None or value.dtype is None or not x.dtype.is_floating_point or not value.dtype.is_floating_point:
        return None
    return x if torch.promote_types(x.dtype, value.dtype) == value.dtype else None


def _increasing(space: Space, value: Value, coords: Coords, along: Coord) -> tuple[Value, float | Value] | None:
    """What is multiplied, or has its row's maximum subtracted, and the factor.  Any other number that is added could
    make equal what was not, and so could a factor that leaves nothing of it."""
    if value.kind != "pointwise" or value.name not in ("mul", "div", "add", "sub"):
        return None
    shifted, divided = value.name in ("add", "sub"), value.name == "div"
    for n, x in enumerate(value.inputs):
        other = value.inputs[1 - n]
        if not isinstance(x, Value) or (n == 1 and value.name in ("div", "sub")):
            continue
        number = constant_of(other) if isinstance(other, Value) else other
        if isinstance(number, int | float):
            if not shifted and positive(number):
                return x, 1 / number if divided else float(number)
        elif isinstance(other, Value) and not space.atoms_of(aligned(coords, other)) & space.atoms_of([along]):
            if shifted and _is_maximum(other, x):
                return x, 1.0
            if not shifted and positive(other):
                return x, other
    return None


def _is_maximum(shift: Value, x: Value) -> bool:
    """Whether it is the row's own maximum, or as good as that, of these scores."""
    while (inner := through(shift)) is not None:
        shift = inner
    if shift.kind != "reduce" or not is_of_the_scores_size(shift):
        return False
    of = shift.inputs[0]
    while of is not x and (inner := through(of)) is not None:
        of = inner
    return of is x
