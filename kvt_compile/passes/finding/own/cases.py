"""What a model makes of its scores, read twice: for a key that is selected, and for one that is not.

    mask = zeros(..).scatter_(-1, topk(t, 5)[1], 1.)       selected: 1      else: 0
    where(mask > 0, t, -inf)                               selected: t      else: -inf
    t + (1 - mask) * -1e9                                  selected: t      else: about -1e9

Any spelling whose two readings are (t, -inf) is a softmax over the k largest scores.  Which keys are selected is
written down on the way (`Cases.kept`); everything but a selection has one reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Value, broadcasts, same
from kvt_compile.passes.finding.own.alike import same_largest
from kvt_compile.passes.finding.own.constants import CASTS, as_number, constant_of
from kvt_compile.passes.finding.own.cuts import kept_by_place, threshold_of
from kvt_compile.passes.finding.own.masks import NEVER
from kvt_compile.passes.finding.own.numbers import computed
from kvt_compile.passes.finding.own.order import Function, Order, below, exactly, ordered_by
from kvt_compile.passes.finding.own.ranking import Kept, argument, largest_at, values_at
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.reading.read import aligned


@dataclass(frozen=True)
class Element:
    """An element of a tensor of the model: as it was met, and (for comparison) below all rearrangements."""

    value: Value = field(compare=False)
    coords: Coords = field(compare=False)
    base: tuple[Value, Coords]


Case = float | bool | Element
Pair = tuple[Case, Case]
"""(for a key that is selected, for one that is not)"""


@dataclass
class Cases:
    """One reading.  `along` is the coordinate of the softmax's axis, `touched` what is made of some ranking."""

    space: Space
    along: Coord
    touched: set[Value]
    kept: Kept | None = None
    _memo: dict[tuple[Value, Coords], Pair] = field(default_factory=dict)

    def read(self, value: Value, coords: Coords) -> Pair:
        """Both readings of the element of `value` at `coords`.  Raises Unread."""
        coords = self.space.resolve_all(coords)
        key = (value, coords)
        if key not in self._memo:
            self._memo[key] = self._read(value, coords)
        return self._memo[key]

    def _read(self, value: Value, coords: Coords) -> Pair:
        if (known := constant_of(value)) is not None:
            return known, known
        if value not in self.touched:
            return self._same(value, coords)
        if value.kind == "layout" and (below := PULL[value.name](self.space, value, coords)) is not None:
            return self.read(value.inputs[0], below)
        if value.kind == "border" or (value.kind == "opaque" and value.name == "detach"):
            inner = self.read(next(value.operands), coords)
            return inner if not any(isinstance(x, Element) for x in inner) else self._same(value, coords)
        if value.kind == "pointwise":
            return self._pointwise(value, coords)
        if value.kind == "opaque" and value.attrs.get("call") is not None:
            if value.name == "scatter":
                return self._scatter(value, coords)
            if value.name in CASTS:
                return self._cast(value, coords)
        return self._same(value, coords)

    def _same(self, value: Value, coords: Coords) -> Pair:
        element = Element(value, coords, below(self.space, value, coords))
        return element, element

    def _pointwise(self, value: Value, coords: Coords) -> Pair:
        if not all(broadcasts(x.shape, value.shape) for x in value.operands):
            return self._same(value, coords)
        if value.name in _COMPARED and (found := self._compared(value, coords)) is not None:
            return found
        pairs = [self.read(x, aligned(coords, x)) if isinstance(x, Value) else (x, x) for x in value.inputs]
        if all(kept == dropped for kept, dropped in pairs) and any(isinstance(x, Element) for x, _ in pairs):
            return self._same(value, coords)
        kept, dropped = (_computed(value, [pair[n] for pair in pairs]) for n in (0, 1))
        return kept, dropped

    def _compared(self, value: Value, coords: Coords) -> Pair | None:
        """score >= the k-th largest, in any of the eight ways to write it, or its place in the row < k."""
        name, (x, y) = value.name, value.inputs
        for place, number, way in ((x, y, name), (y, x, _SWAPPED[name])):
            if isinstance(place, Value) and place in self.touched:
                found = kept_by_place(self.space, place, aligned(coords, place), self.along, way, number)
                if found is not None:
                    self._selects(found[0])
                    return found[1], not found[1]
        if isinstance(x, Value) and x.name == "sub" and x.kind == "pointwise" and not isinstance(y, Value) and y == 0:
            x, y = x.inputs  # t - threshold >= 0
        for score, threshold, way in ((x, y, name), (y, x, _SWAPPED[name])):
            if not isinstance(score, Value) or not isinstance(threshold, Value) or threshold not in self.touched:
                continue
            kept = threshold_of(self.space, threshold, aligned(coords, threshold), self.along)
            if kept is None:
                continue
            if exactly(self.space, score, aligned(coords, score)) != exactly(self.space, kept.of, kept.coords):
                raise Unread("scores are compared with the k-th largest of others")
            if way in ("gt", "le") and not kept.between:
                raise Unread("only scores above the k-th largest are kept, and not the k-th itself")
            self._selects(kept)
            return (True, False) if way in ("ge", "gt") else (False, True)
        return None

    def _scatter(self, value: Value, coords: Coords) -> Pair:
        dim = axis(argument(value, "dim", 1), len(value.shape))
        base, index = argument(value, "input", 0), argument(value, "index", 2)
        source = argument(value, "src", 3, argument(value, "value", 3))
        if dim is None or not isinstance(base, Value) or not isinstance(index, Value) or source is None:
            return self._same(value, coords)
        if argument(value, "reduce", 4) is not None:
            raise Unread("what is written at the selected keys is added to what is there")
        if self.space.resolve(coords[dim]) != self.space.resolve(self.along):
            raise Unread("it is not along the axis of the softmax that something is selected")
        others = [d for d in range(len(value.shape)) if d != dim]
        if not all(same(index.shape[d], value.shape[d]) for d in others):
            raise Unread("keys are selected for a part of the queries")
        which = self.space.fresh("m", index.shape[dim])
        inside = (*coords[:dim], which, *coords[dim + 1 :])
        kept = largest_at(self.space, index, inside, which, self.along)
        if kept is None:
            return self._same(value, coords)
        self._selects(kept)
        written = self._written(value, source, inside, coords, dim, which, kept)
        return written, self.read(base, coords)[1]

    def _written(
        self, value: Value, source: Any, inside: Coords, coords: Coords, dim: int, which: Coord, kept: Kept
    ) -> Case:
        """What is scattered: a number, as the result holds it, or the scores themselves."""
        if isinstance(source, bool | int | float):
            return _held(value, source)
        if not isinstance(source, Value):
            raise Unread("what is written at the selected keys is known only at run time")
        if (known := constant_of(source)) is not None:
            return _held(value, known)
        if not all(map(same, source.shape, (self.space.size(c) for c in inside))):
            raise Unread("more is handed to scatter than it writes")
        found = values_at(self.space, source, inside, which, self.along)
        if found is not None and self._lists_as(found, kept):
            return Element(kept.of, self._at(kept), below(self.space, kept.of, kept.coords))
        if source.kind == "opaque" and source.name in ("gather", "take_along_dim") and source.attrs["call"] is not None:
            of, index = argument(source, "input", 0), argument(source, "index", 2)
            if source.name == "take_along_dim":
                index = argument(source, "indices", 1)
            where = axis(argument(source, "dim", 2 if source.name == "take_along_dim" else 1), len(source.shape))
            if where == dim and isinstance(of, Value) and isinstance(index, Value):
                again = largest_at(self.space, index, inside, which, self.along)
                if again is not None and self._lists_as(again, kept):
                    return self.read(of, coords)[0]
        raise Unread("what is written at the selected keys is not their scores")

    def _at(self, kept: Kept) -> Coords:
        return self.space.resolve_all(kept.coords)

    def _lists_as(self, x: Kept, y: Kept) -> bool:
        """Whether two lists are of the same elements in the same order."""
        return (x.of, self._at(x), x.own) == (y.of, self._at(y), y.own) and x.lists_as(y)

    def _cast(self, value: Value, coords: Coords) -> Pair:
        pair = self.read(next(value.operands), coords)
        if any(isinstance(x, Element) for x in pair) or value.dtype is None:
            return self._same(value, coords)
        kept, dropped = (None if isinstance(x, Element) else as_number(value.dtype, x) for x in pair)
        return self._same(value, coords) if kept is None or dropped is None else (kept, dropped)

    def _selects(self, kept: Kept) -> None:
        if self.kept is not None and (self.kept.own != kept.own or self.order_of(kept) != self.order_of(self.kept)):
            raise Unread("several selections are combined")
        self.kept = self.kept or kept

    # ---- order -------------------------------------------------------------------------------------------------------

    def order_of(self, kept: Kept) -> Order:
        return ordered_by(self.space, kept.of, kept.coords, self.along)

    def same_largest(self, element: tuple[Value, Coords], kept: Kept, after: Sequence[Function] = ()) -> bool:
        """Whether an element's k largest, which goes through the functions `after` on its way to the softmax, are the
        kept ones: it is the same score, but for a positive factor."""
        return same_largest(self.space, self.order_of(kept), ordered_by(self.space, *element, self.along), after)


# ---- numbers ---------------------------------------------------------------------------------------------------------

_COMPARED = frozenset({"ge", "gt", "le", "lt"})
_SWAPPED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}


def _computed(value: Value, arguments: list[Any]) -> Case:
    """One reading of a pointwise value whose readings differ."""
    name = value.name
    if name == "where" and isinstance(arguments[0], bool):
        chosen: Case = arguments[1] if arguments[0] else arguments[2]
        return chosen if isinstance(chosen, Element) else _held(value, chosen)
    elements = [x for x in arguments if isinstance(x, Element)]
    if not elements and (found := computed(value, arguments)) is not None:
        return found
    if len(elements) == 1 and len(arguments) == 2:
        (number,) = (x for x in arguments if not isinstance(x, Element))
        if _leaves_it(name, number, arguments[0] is elements[0]):
            return elements[0]
        if name == "add" and number <= NEVER:
            return _held(value, number)  # t - 1e9 weighs as little as -1e9 does
        if name == "mul" and number == 0 and elements[0].value.kind == "softmax":
            return 0.0
    if elements and name == "identity" and elements[0].value.dtype == value.dtype:
        return elements[0]
    raise Unread(f"{value.node.name} makes something else of selected scores")


def _held(value: Value, x: float | bool) -> float | bool:
    found = None if value.dtype is None else as_number(value.dtype, x)
    if found is None:
        raise Unread(f"{value.node.name} holds no such number as {x:g}")
    return found


def _leaves_it(name: str, number: float, first: bool) -> bool:
    """Whether x op number is x."""
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}
    return name in neutral and number == neutral[name] and (first or name in ("add", "mul"))
