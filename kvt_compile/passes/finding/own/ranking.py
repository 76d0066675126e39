"""topk, sort, kthvalue -> what is ranked, along which axis, and which of its elements a result holds.

topk(t, 5)[0][..., -1:]        the 5th largest of t          topk(t, 5)[1]        where the 5 largest of t stand
sort(t, descending=True)[0][..., 4]                          sort(...)[1][..., :5]
kthvalue(t, N - 4)[0]                                        argsort(...)[..., :5]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis, integer
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.spellings import Call
from kvt_compile.passes.canonical.values import Dim, Value, as_dim, dim_of, meta_value, same
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.site import OwnK

RANKS = frozenset({"topk", "sort", "argsort", "kthvalue", "msort"})
"""Operations that select by rank and are read here."""
SELECTS = RANKS | {"median", "nanmedian", "quantile", "nanquantile"}
"""All operations that compare the elements of a row with each other to choose among them."""


def ranks(value: Value) -> bool:
    return value.kind == "opaque" and value.name in SELECTS


def argument(value: Value, name: str, position: int, default: Any = None) -> Any:
    """An argument of an opaque call; a tensor of the graph as the Value it had then."""
    call: Call = value.attrs["call"]
    given = call.kwargs.get(name, call.args[position] if len(call.args) > position else default)
    return value.attrs["given"].get(given, given) if isinstance(given, fx.Node) else given


@dataclass(frozen=True)
class Ranking:
    """The `count` first elements of `of` along `dim`, largest or smallest first (if they are sorted)."""

    call: Value
    of: Value
    dim: int
    count: OwnK
    largest: bool
    sorted: bool

    @property
    def all(self) -> bool:
        """Whether every element is in it."""
        return same(_size(self.count), self.of.shape[self.dim])


Place = tuple[int, bool]
"""A position in a ranking, and whether it is counted from its end (1: the last)."""


@dataclass(frozen=True)
class Kept:
    """The k largest elements along one axis: of `of` at `coords`, in which the coordinate of that axis runs."""

    of: Value
    coords: Coords
    own: OwnK
    between: bool = False
    """For a threshold: whether it lies between the k-th largest and the next one, and is no element itself."""
    listed: tuple[Value, bool | None] | None = None
    """For positions and values, which one after the other lists: by which call, and whether the largest is first
    (None: in no order)."""

    def lists_as(self, other: Kept) -> bool:
        """Whether two lists of the same elements have them in the same places."""
        if self.listed is None or other.listed is None:
            return False
        (call, first), (others_call, others_first) = self.listed, other.listed
        return call is others_call or (first is not None and first == others_first)


def ranked_at(space: Space, of: Value, dim: int, coords: Coords, along: Coord, *, keeps: bool = True) -> Coords:
    """Where what is ranked along `dim` stands, for the coordinates of a result that keeps this axis or has it no more.
    Raises Unread unless `along` runs over all that is ranked."""
    if not space.covers(along, of.shape[dim]):
        raise Unread("keys are selected from other keys than those of the softmax, or from a part of them")
    return (*coords[:dim], along, *coords[dim + keeps :])


# ---- counts ----------------------------------------------------------------------------------------------------------


def own_k(number: Any, minus: OwnK | None = None) -> OwnK | None:
    """A k as an argument of the model's own call: a number, or a node that holds one."""
    known = integer(number)
    if known is not None:
        return OwnK(str(known), known)
    fake = meta_value(number) if isinstance(number, fx.Node) else None
    return OwnK(str(dim_of(fake)), 0, number, size=dim_of(fake)) if isinstance(fake, torch.SymInt) else None


def all_of(size: Dim) -> OwnK:
    """As many as there are."""
    return OwnK(str(size), size) if isinstance(size, int) else OwnK(str(size), 0, from_keys=True, size=size)


def _size(own: OwnK) -> Dim:
    return own.size if own.known is None else own.known


def plus(own: OwnK, number: int) -> OwnK:
    if number == 0:
        return own
    if own.known is not None:
        return OwnK(str(own.known + number), own.known + number)
    size = own.size + number
    return replace(own, text=str(size), number=own.number + number, size=size)


def _from_smallest(keys: Dim, kth: OwnK) -> OwnK | None:
    """The k of the largest where the kth smallest is given: N - k + 1."""
    size = as_dim(sympy.sympify(keys) + 1 - _size(kth))
    if isinstance(size, int):
        return OwnK(str(size), size)
    if kth.known is not None:
        return OwnK(str(size), 1 - kth.known, from_keys=True, size=size)
    if kth.from_keys or kth.minus:
        return None
    return OwnK(str(size), 1 - kth.number, kth.node, from_keys=True, minus=True, size=size)


# ---- operations ------------------------------------------------------------------------------------------------------


def _ranking(value: Value) -> Ranking | None:
    """The call of topk, sort or argsort."""
    if value.kind != "opaque" or value.name not in ("topk", "sort", "argsort", "msort") or value.attrs["call"] is None:
        return None
    of = argument(value, "input", 0)
    if not isinstance(of, Value):
        return None
    if value.name == "topk":
        dim = axis(argument(value, "dim", 2, -1), len(of.shape))
        largest, in_order = argument(value, "largest", 3, True), argument(value, "sorted", 4, True)
        count = own_k(argument(value, "k", 1))
    else:
        dim = axis(0 if value.name == "msort" else argument(value, "dim", 1, -1), len(of.shape))
        largest, in_order = argument(value, "descending", 2, False), True
        count = None if dim is None else all_of(of.shape[dim])
    if dim is None or count is None or not isinstance(largest, bool) or not isinstance(in_order, bool):
        return None
    return Ranking(value, of, dim, count, largest, in_order)


def piece_of(value: Value) -> tuple[Value, int] | None:
    """results[item] of an operation with several results: (the operation, item)."""
    call = value.attrs.get("call")
    if value.kind != "opaque" or value.name != "getitem" or not isinstance(call, Call) or len(call.args) != 2:
        return None
    whole, item = argument(value, "input", 0), call.args[1]
    is_many = isinstance(whole, Value) and not isinstance(meta_value(whole.node), torch.Tensor)
    return (whole, item) if is_many and isinstance(item, int) else None


def ranked(value: Value, item: int) -> Ranking | None:
    """The ranking whose elements (item 0) or positions (item 1) a value holds."""
    if value.name == "argsort":
        return _negated(_ranking(value)) if item == 1 else None
    if value.name == "msort":
        return _ranking(value) if item == 0 else None
    piece = piece_of(value)
    if piece is None or piece[1] != item:
        return None
    return _negated(_ranking(piece[0])) if item == 1 else _ranking(piece[0])


def _negated(ranking: Ranking | None) -> Ranking | None:
    """Where the smallest of -x stand, the largest of x do."""
    while ranking is not None and ranking.of.kind == "pointwise" and ranking.of.name == "neg":
        ranking = replace(ranking, of=ranking.of.inputs[0], largest=not ranking.largest)
    return ranking


def through(value: Value) -> Value | None:
    """The value it is, detached or copied."""
    if value.kind == "border" or (value.kind == "opaque" and value.name in ("detach", "data") and value.inputs):
        return next(value.operands)
    if value.kind == "pointwise" and value.name == "identity" and isinstance(value.inputs[0], Value):
        return value.inputs[0] if value.inputs[0].dtype == value.dtype else None
    return None


def pulled(space: Space, value: Value, coords: Coords) -> tuple[Value, Coords]:
    """Through rearrangements, copies and detachments to what is below."""
    while True:
        inner = through(value)
        if inner is not None:
            value = inner
            continue
        below = PULL[value.name](space, value, coords) if value.kind == "layout" else None
        if below is None:
            return value, space.resolve_all(coords)
        value, coords = value.inputs[0], below


# ---- elements --------------------------------------------------------------------------------------------------------


def kth_largest(space: Space, value: Value, coords: Coords, along: Coord) -> Kept | None:
    """What a value's element at `coords` is the k-th largest of, along the axis that `along` runs over; None where it
    is no element of a ranking.  Raises Unread for one that is, but not of the largest."""
    value, coords = pulled(space, value, coords)
    if (one := _one_of(value)) is not None:
        source, dim, place, keeps = one
        ranking, at, which = _results(space, source, dim, coords, keeps)
        if ranking is None or at[ranking.dim] != which or not space.covers(which, _size(ranking.count)):
            return None
        return _kept(space, ranking, at, along, place)
    if (ranking := ranked(value, 0)) is not None:
        position = space.known(coords[ranking.dim])
        return None if position is None else _kept(space, ranking, coords, along, (position, False))
    if (least := _least_of(value)) is not None:
        source, dim, keeps = least
        ranking, at, which = _results(space, source, dim, coords, keeps)
        return counted_off(ranking, space, at, which, along)
    piece = piece_of(value)
    if piece is not None and piece[1] == 0 and piece[0].name == "kthvalue" and piece[0].attrs["call"] is not None:
        return _kth_value(space, piece[0], coords, along)
    return None


def _results(
    space: Space, source: Value, dim: int, coords: Coords, keeps: bool
) -> tuple[Ranking | None, Coords, Coord]:
    """(the ranking whose elements a value holds, their coordinates, what counts them off along an axis), where that
    axis is gone at `coords`, or has size 1."""
    which = space.fresh("m", source.shape[dim])
    source, at = pulled(space, source, (*coords[:dim], which, *coords[dim + keeps :]))
    return ranked(source, 0), at, space.resolve(which)


def _kth_value(space: Space, value: Value, coords: Coords, along: Coord) -> Kept | None:
    of, kth = argument(value, "input", 0), own_k(argument(value, "k", 1))
    dim = axis(argument(value, "dim", 2, -1), len(of.shape)) if isinstance(of, Value) else None
    own = None if dim is None or kth is None else _from_smallest(of.shape[dim], kth)
    if dim is None or own is None:
        return None
    keeps = bool(argument(value, "keepdim", 3, False))
    return Kept(of, ranked_at(space, of, dim, coords, along, keeps=keeps), own)


def _kept(space: Space, ranking: Ranking, coords: Coords, along: Coord, position: Place) -> Kept:
    if not ranking.sorted:
        raise Unread("the threshold is one of topk's values, which are not sorted (sorted=False)")
    own = _from_the_largest(ranking, position)
    if own is None:
        raise Unread("the keys with the smallest scores are selected, not those with the largest")
    return Kept(ranking.of, ranked_at(space, ranking.of, ranking.dim, coords, along), own)


def _from_the_largest(ranking: Ranking, place: Place) -> OwnK | None:
    """The k for which the element at a place is the k-th largest; None where it is one of the smallest."""
    number, from_end = place
    if ranking.largest:
        return plus(ranking.count, 1 - number) if from_end else OwnK(str(number + 1), number + 1)
    size = ranking.of.shape[ranking.dim]
    if not ranking.all:
        return None
    if from_end:
        return OwnK(str(number), number)
    return OwnK(str(size - number), size - number) if isinstance(size, int) else None


def _one_of(value: Value) -> tuple[Value, int, Place, bool] | None:
    """x[..., -n], x[..., -1:], x[..., n : n + 1] of an axis whose size is known only at run time: (x, axis, which,
    whether the axis stays)."""
    call = value.attrs.get("call")
    if value.kind != "opaque" or not isinstance(call, Call):
        return None
    source = argument(value, "input", 0)
    if not isinstance(source, Value) or not source.shape:
        return None
    rank = len(source.shape)
    if value.name in ("select", "slice"):
        dim = axis(argument(value, "dim", 1, 0), rank)
        if value.name == "select":
            item: Any = integer(argument(value, "index", 2))
        else:
            item = slice(integer(argument(value, "start", 2)), integer(argument(value, "end", 3)))
    elif value.name == "getitem" and len(call.args) == 2:
        *before, item = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        if not before or not all(x is Ellipsis or x == slice(None) for x in before):
            return None
        if Ellipsis not in before and len(before) + 1 != rank:
            return None
        dim = rank - 1
    else:
        return None
    place = _place(item)
    return None if dim is None or place is None else (source, dim, place, isinstance(item, slice))


def _place(item: Any) -> Place | None:
    """The one position that an index takes."""
    if isinstance(item, slice):
        if item.step not in (None, 1) or not isinstance(item.start, int):
            return None
        if item.start == -1 and (item.stop is None or (isinstance(item.stop, int) and item.stop > 1 << 40)):
            return 1, True
        return (item.start, False) if item.start >= 0 and item.stop == item.start + 1 else None
    if not isinstance(item, int) or isinstance(item, bool):
        return None
    return (-item, True) if item < 0 else (item, False)


def _least_of(value: Value) -> tuple[Value, int, bool] | None:
    """min(x, dim).values, amin(x, dim): (x, axis, whether it stays as one of size 1)."""
    if value.kind == "reduce" and value.name == "amin" and len(value.attrs["dims"]) == 1:
        return value.inputs[0], value.attrs["dims"][0], bool(value.attrs["keepdim"])
    piece = piece_of(value)
    if piece is None or piece[1] != 0 or piece[0].name != "min" or piece[0].attrs["call"] is None:
        return None
    source = argument(piece[0], "input", 0)
    dim = axis(argument(piece[0], "dim", 1), len(source.shape)) if isinstance(source, Value) else None
    return None if dim is None else (source, dim, bool(argument(piece[0], "keepdim", 2, False)))


def largest_at(space: Space, value: Value, coords: Coords, which: Coord, along: Coord) -> Kept | None:
    """For a value that holds positions of a ranking, counted off by the coordinate `which`: the elements that stand
    there.  Raises Unread for positions of others than the largest."""
    value, coords = pulled(space, value, coords)
    return counted_off(ranked(value, 1), space, coords, which, along)


def values_at(space: Space, value: Value, coords: Coords, which: Coord, along: Coord) -> Kept | None:
    """The same for a value that holds the elements themselves.  A detached one is not: it has no gradient."""
    while value.kind == "layout" and (below := PULL[value.name](space, value, coords)) is not None:
        value, coords = value.inputs[0], below
    return counted_off(ranked(value, 0), space, space.resolve_all(coords), which, along)


def counted_off(ranking: Ranking | None, space: Space, coords: Coords, which: Coord, along: Coord) -> Kept | None:
    """What a ranking's results at these coordinates hold, where `which` counts them off."""
    if ranking is None:
        return None
    here, which = coords[ranking.dim], space.resolve(which)
    if here.digits != which.digits or here.step != 1:
        return None
    taken, all_there = space.size(which), _size(ranking.count)
    own = ranking.count if same(taken, all_there) else OwnK(str(taken), taken) if isinstance(taken, int) else None
    at_end = here.start and ranking.all and same(as_dim(taken + here.start), all_there)
    if own is None or (here.start and not at_end):
        return None
    if own is not ranking.count and not ranking.sorted:
        raise Unread("some of topk's results are used, which are not sorted (sorted=False)")
    if own is not ranking.count and ranking.largest == bool(at_end):
        raise Unread("the keys with the smallest scores are selected, not those with the largest")
    if own is ranking.count and not ranking.largest and not ranking.all:
        raise Unread("the keys with the smallest scores are selected, not those with the largest")
    listed = ranking.call, ranking.largest if ranking.sorted else None
    return Kept(ranking.of, ranked_at(space, ranking.of, ranking.dim, coords, along), own, listed=listed)
