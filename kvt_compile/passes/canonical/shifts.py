"""Whether softmax(x - c) is softmax(x) in floats too: c is of the size of the scores that count in its row.

    x - x.amax(-1)        x - x.logsumexp(-1)       of any x: the row's own
    t - t.mean(-1)        t - t.max()               of bare scores t, a product times numbers, masked or not

Any other number of a row may be so large that x is forgotten: what x = where(m, -1e30, t) leaves of x - x.mean(-1) has
no t in it any more.
"""

from __future__ import annotations

import math
from typing import Any

from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import NOT_MEANT, Value, is_number, same

Place = tuple[Value, Coords]
_LARGEST = frozenset({"amax", "logsumexp"})
_REPEATED = frozenset({"pointwise", "layout", "border"})
_OF_BARE = _LARGEST | {"amin", "mean"}


def is_own(space: Space, row: Coord, shift: Place, kept: Place) -> bool:
    """Whether `shift`, one number for each row, may be taken from `kept`."""
    reduction, at = original(space, *shift)
    if reduction.kind != "reduce" or reduction.name not in _OF_BARE:
        return False
    inside = within(space, reduction, at, row)
    if inside is not None and reduction.name in _LARGEST:
        first, second = original(space, reduction.inputs[0], inside), original(space, *kept)
        if alike(first[0], second[0]) and space.resolve_all(first[1]) == space.resolve_all(second[1]):
            return True
    return _is_of_bare(reduction, kept[0])


def is_of_their_size(reduction: Value) -> bool:
    """Whether what one row is reduced to is of the size of its scores that count."""
    return reduction.name in _LARGEST or (reduction.name in _OF_BARE and is_bare(reduction.inputs[0]))


def alike(x: Any, y: Any, depth: int = 8) -> bool:
    """Whether two values are the same, or computed alike of the same ones, as a scale that is written twice."""
    if x is y or not (isinstance(x, Value) and isinstance(y, Value)):
        return x is y or (type(x) is type(y) and not isinstance(x, Value) and bool(x == y))
    if (x.kind, x.name, x.shape, x.dtype) != (y.kind, y.name, y.shape, y.dtype) or x.kind not in _REPEATED:
        return False
    if x.name == "dropout" or not depth or len(x.inputs) != len(y.inputs):
        return False
    said = [{key: z for key, z in value.attrs.items() if key not in NOT_MEANT} for value in (x, y)]
    return said[0] == said[1] and all(alike(a, b, depth - 1) for a, b in zip(x.inputs, y.inputs, strict=True))


def original(space: Space, value: Value, at: Coords) -> Place:
    """The element that has the same number: below rearrangements, casts and what is detached."""
    while True:
        if value.kind == "layout":
            pulled = PULL[value.name](space, value, at)
            if pulled is None:
                return value, space.resolve_all(at)
            value, at = value.inputs[0], pulled
        elif (copied := _copied(value)) is not None:
            value, at = copied, at[len(at) - len(copied.shape) :]
        else:
            return value, space.resolve_all(at)


def within(space: Space, reduction: Value, at: Coords, row: Coord) -> Coords | None:
    """Where the elements of a row stand in what is reduced along it; None where it is reduced along anything else."""
    dims, of = reduction.attrs["dims"], reduction.inputs[0]
    if len(dims) != 1:
        return None
    (dim,) = dims
    rest = [coord for d, coord in enumerate(at) if not (reduction.attrs["keepdim"] and d == dim)]
    along = space.atoms_of([row])
    if not same(space.size(row), of.shape[dim]) or along & space.atoms_of(rest):
        return None
    return tuple(
        ZERO if size == 1 else coord for size, coord in zip(of.shape, (*rest[:dim], row, *rest[dim:]), strict=True)
    )


def _copied(value: Value) -> Value | None:
    """What a value is a copy of, perhaps in another dtype or without a gradient."""
    inner = value.inputs[0] if value.inputs else None
    if not isinstance(inner, Value) or inner.shape != value.shape:
        return None
    if value.kind == "border" or (value.name == "detach" and value.kind in ("opaque", "pointwise")):
        return inner
    real = inner.dtype is not None and inner.dtype.is_floating_point
    return inner if value.kind == "pointwise" and value.name == "identity" and real else None


# ---- bare scores -----------------------------------------------------------------------------------------------------


def _is_of_bare(reduction: Value, kept: Value) -> bool:
    """Whether it is taken of bare scores, whichever of them, and from the same ones: all of them are of one size."""
    of, whole = _below(reduction.inputs[0]), _below(kept)
    bare, low = _unmasked(whole)
    if not is_bare(bare):
        return False
    return alike(of, bare) or (alike(of, whole) and low and reduction.name in _LARGEST)


def is_bare(value: Value) -> bool:
    """Whether it is a product times numbers."""
    while value.kind != "contraction":
        scaled = value.kind == "pointwise" and value.name in ("mul", "div", "neg", "identity")
        inputs = [x for x in value.inputs if isinstance(x, Value) and not is_number(x) and not _is_single(x)]
        if len(inputs) != 1 or not (scaled or value.kind in ("layout", "border") or value.name == "detach"):
            return False
        if value.name == "div" and inputs[0] is not value.inputs[0]:
            return False
        value = inputs[0]
    return True


def _is_single(value: Value) -> bool:
    """A tensor of one number, as of a learned temperature."""
    return value.kind != "contraction" and all(size == 1 for size in value.shape)


def _below(value: Value) -> Value:
    while (inner := value.inputs[0] if value.kind == "layout" else _copied(value)) is not None:
        value = inner
    return value


def _unmasked(value: Value) -> tuple[Value, bool]:
    """What is below masks that put numbers in the place of scores, and whether none of them is above 0."""
    low = True
    while value.kind == "pointwise" and value.name == "where":
        numbers = [_number(x) for x in value.inputs[1:]]
        if (numbers[0] is None) == (numbers[1] is None):
            break
        low = low and min(x for x in numbers if x is not None) <= 0
        value = _below(value.inputs[1 + (numbers[0] is not None)])
    return value, low


def _number(x: Any) -> float | None:
    if isinstance(x, Value) and x.name in ("constant", "fill") and x.inputs:
        x = x.inputs[-1]
    real = isinstance(x, int | float) and not isinstance(x, bool) and not math.isnan(x)
    return float(x) if real else None
