"""Selections that rank without taking: the place of every score in its row, and quantiles -> the k largest.

t.argsort(-1, descending=True).argsort(-1) < 5            the 5 largest
t >= t.quantile(0.9, -1, keepdim=True)                    of 101 keys the 11 largest
t >= t.median(-1, keepdim=True).values                    the larger half
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.masks import mask_in
from kvt_compile.passes.finding.own.ranking import (
    Kept,
    all_of,
    argument,
    kth_largest,
    own_k,
    piece_of,
    plus,
    pulled,
    ranked,
    ranked_at,
)
from kvt_compile.passes.finding.own.unread import Unread

_NEAR = 1e-3
"""Nearer to an element of the row, rounding decides whether a quantile is it."""

_WHOLE: dict[str, Callable[[float], int]] = {"lower": math.floor, "higher": math.ceil, "nearest": round}
"""Ways of a quantile that take an element."""


def kept_by_place(
    space: Space, value: Value, coords: Coords, along: Coord, way: str, number: Any
) -> tuple[Kept, bool] | None:
    """(the k largest, what the comparison says of them) of `place < number`, where a value holds each score's place in
    its row; None for any other value."""
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        return None
    value, coords = pulled(space, value, coords)
    outer = ranked(value, 1)
    if outer is None or outer.largest or not outer.all or coords[outer.dim] != space.resolve(along):
        return None
    places, at = pulled(space, outer.of, coords)
    inner = ranked(places, 1)
    if inner is None or not inner.all or inner.dim >= len(at) or at[inner.dim] != space.resolve(along):
        return None
    ranked_at(space, outer.of, outer.dim, coords, along)  # as many places are ranked as there are keys
    below = math.ceil(number) if way in ("lt", "ge") else math.floor(number) + 1
    keys = inner.of.shape[inner.dim]
    if below < 1 or (isinstance(keys, int) and below >= keys):
        raise Unread("the places that are compared leave out every key, or none")
    own = own_k(below) if inner.largest else plus(all_of(keys), -below)
    assert own is not None
    kept = Kept(inner.of, ranked_at(space, inner.of, inner.dim, at, along), own)
    return kept, inner.largest == (way in ("lt", "le"))


def threshold_of(space: Space, value: Value, coords: Coords, along: Coord) -> Kept | None:
    """The k largest that are at least what a value is at `coords`; None where that is not understood."""
    found = kth_largest(space, value, coords, along)
    if found is not None:
        return found
    value, coords = pulled(space, value, coords)
    piece = piece_of(value)
    if piece is not None and piece[1] == 0 and piece[0].name == "median" and piece[0].attrs["call"] is not None:
        return _median(space, piece[0], coords, along)
    return _quantile(space, value, coords, along)


def _quantile(space: Space, value: Value, coords: Coords, along: Coord) -> Kept | None:
    """What a quantile's element at `coords` cuts off."""
    if value.name != "quantile" or value.attrs.get("call") is None:
        return None
    of, share = argument(value, "input", 0), argument(value, "q", 1)
    dim = axis(argument(value, "dim", 2), len(of.shape)) if isinstance(of, Value) else None
    if dim is None or not isinstance(share, int | float) or of.dtype is None:
        return None
    keys = of.shape[dim]
    if not isinstance(keys, int):
        raise Unread("the scores are compared with a quantile of a number of keys that is known only at run time")
    if mask_in(of) is not None:
        raise Unread("the scores are compared with a quantile, which is no number where keys are masked")
    place = float(torch.tensor(share, dtype=of.dtype) * (keys - 1))  # as torch rounds it
    how = argument(value, "interpolation", 4, "linear")
    if how not in ("linear", "midpoint"):
        if how not in _WHOLE:
            return None
        place = _WHOLE[how](place)
    if 0 < abs(place - round(place)) < _NEAR:
        raise Unread("the scores are compared with a quantile that all but is one of them")
    own, keeps = own_k(keys - math.ceil(place)), bool(argument(value, "keepdim", 3, False))
    assert own is not None
    return Kept(of, ranked_at(space, of, dim, coords, along, keeps=keeps), own, between=place != int(place))


def _median(space: Space, value: Value, coords: Coords, along: Coord) -> Kept | None:
    """What the values of `x.median(dim)` cut off: torch's median of an even number is the lower one."""
    of = argument(value, "input", 0)
    dim = axis(argument(value, "dim", 1), len(of.shape)) if isinstance(of, Value) else None
    if dim is None or not isinstance(of.shape[dim], int):
        return None
    own, keeps = own_k(of.shape[dim] - (of.shape[dim] - 1) // 2), bool(argument(value, "keepdim", 2, False))
    assert own is not None
    return Kept(of, ranked_at(space, of, dim, coords, along, keeps=keeps), own)
