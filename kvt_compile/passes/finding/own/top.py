"""A softmax of the top scores alone -> a softmax of all scores, and whatever it is used for with it.

    values, index = topk(t, 5);  w = softmax(values)

    zeros(..).scatter(-1, index, w) @ v                             ->     softmax(t) @ v, own k = 5
    einsum("bhim,bhimd->bhid", w, gathered v at index)              ->     the same

Every value between the scores and the end gets the keys' size in the place of k ("widened").  The keys that are not
selected weigh 0 in the k-NN softmax, so a sum over all keys is the sum over the selected ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Dim, Value, same, same_shape
from kvt_compile.passes.finding.own.alike import alike
from kvt_compile.passes.finding.own.constants import constant_of
from kvt_compile.passes.finding.own.gathers import gather_of
from kvt_compile.passes.finding.own.order import Function, factor_of, ordered_by
from kvt_compile.passes.finding.own.positive import lasting
from kvt_compile.passes.finding.own.ranking import Kept, Ranking, argument, counted_off, largest_at, ranked
from kvt_compile.passes.finding.own.settle import settle
from kvt_compile.passes.finding.own.steps import Step, followed, make_wide
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.reading.read import aligned


def of_the_top(anchor: Value) -> bool:
    """Whether it is a softmax over the k top values, and not over all keys."""
    return _below(anchor) is not None


WhichKeys = Callable[[Space, Coords, Coord, Coord], Kept | None]
"""(space, coordinates of the weights, which of the top keys, the keys) -> what they are the weights of."""


def widen(graph: CanonicalGraph, anchor: Value, scores: Value | None = None) -> None:
    """Makes it a softmax of all scores: those that were ranked, or others that rank as they do.  Raises Unread."""
    below = _below(anchor)
    assert below is not None
    ranking, way = below
    if not _keeps_order(ranking, way):
        raise Unread("what the top scores are multiplied with leaves too little of them")
    ahead = steps_ahead(graph, anchor)
    last = ahead[-1]
    keys = ranking.of.shape[ranking.dim]
    end = last.value.users[0]
    if end.kind == "opaque" and end.name == "scatter":
        own, changed = _scattered(end, [*way, *ahead], ranking)
    elif end.kind == "contraction":
        steps = [*way, *ahead]

        def mine(space: Space, coords: Coords, which: Coord, along: Coord) -> Kept | None:
            return counted_off(ranking, space, read_below(space, steps, coords), which, along)

        own, changed = gathered(end, ahead[-1], keys, mine)
    else:
        raise Unread(f"what becomes of the weights of the top keys ({end.node.name}) is not understood")
    first = way[0].value if way else anchor
    of = ranking.of if scores is None else scores
    first.inputs = tuple(of if isinstance(x, Value) and ranked(x, 0) is not None else x for x in first.inputs)
    for step in (*way, *ahead):
        make_wide(step, keys)
    anchor.attrs["own"] = own
    widened = {step.value for step in (*way, *ahead)} | changed
    anchor.attrs["selection"] = settle(graph) | widened


def _below(anchor: Value) -> tuple[Ranking, list[Step]] | None:
    """The ranking whose values the softmax is of, and the steps between, first to last."""
    value, dim = anchor.inputs[0], anchor.attrs["dim"]
    way: list[Step] = []
    while (ranking := ranked(value, 0)) is None:
        step = back(value, dim)
        if step is None:
            return None
        way.insert(0, Step(value, dim))
        value, dim = step
    whole = _counts(ranking, value)
    return (ranking, way) if ranking.dim == dim and whole else None


def _keeps_order(ranking: Ranking, way: list[Step]) -> bool:
    """Whether what stands between the ranking and the softmax makes nothing equal."""
    space = Space()
    coords = tuple(space.fresh(f"y{d}", size) for d, size in enumerate(ranking.of.shape))
    order = ordered_by(space, ranking.of, coords, coords[ranking.dim])
    return alike((), factors_of(way), (*order.functions, *order.product))


def factors_of(way: list[Step]) -> list[Function]:
    """What is multiplied on a way of such steps."""
    found = []
    for step in way:
        if step.value.name in ("mul", "div"):
            (other,) = (x for n, x in enumerate(step.value.inputs) if n != _side(step.value))
            found.append(factor_of(step.value, other))
    return found


def _side(value: Value) -> int:
    """Which operand of a product has its size, and is scaled by the other."""
    return 0 if value.name == "div" or value.inputs[0] in _whole(value) else 1


def _whole(value: Value) -> list[Value]:
    return [x for x in value.operands if x.shape == value.shape]


def _counts(ranking: Ranking, value: Value) -> bool:
    return len(value.shape) == len(ranking.of.shape) and not ranking.all


def back(value: Value, dim: int) -> tuple[Value, int] | None:
    """(what a value is a strictly increasing function of, its dimension of the top keys)."""
    if value.kind == "layout":
        at = followed(value, dim)
        return None if at is None else (value.inputs[0], at)
    if value.kind != "pointwise" or value.name not in ("mul", "div", "identity"):
        return None
    whole = _whole(value)
    x = value.inputs[0 if value.name == "identity" else _side(value)]
    if x not in whole or x.dtype is None or not x.dtype.is_floating_point:
        return None
    others = [y for y in value.inputs if y is not x]
    one_a_row = all(size_at(y, value, dim) == 1 for y in others if isinstance(y, Value))
    lasts = all(lasting(y, value.dtype) for y in others)
    return (x, dim) if len(others) < len(value.inputs) and one_a_row and lasts else None


def steps_ahead(graph: CanonicalGraph, anchor: Value) -> list[Step]:
    """From the softmax to what scatters its weights or sums with them."""
    steps = [Step(anchor, anchor.attrs["dim"])]
    while True:
        value, dim = steps[-1].value, steps[-1].dim
        if len(value.users) != 1 or value in graph.outputs:
            raise Unread("the weights of the top keys are read at several places")
        user = value.users[0]
        if user.kind == "contraction" or (user.kind == "opaque" and user.name == "scatter"):
            return steps
        steps.append(Step(user, _onwards(user, value, dim)))


def _onwards(user: Value, value: Value, dim: int) -> int:
    """The dimension of the user's result that counts the top keys."""
    if user.kind == "layout":
        for d in range(len(user.shape)):
            if followed(user, d) == dim:
                return d
    if user.kind == "pointwise":
        at = dim + len(user.shape) - len(value.shape)
        others = [x for x in user.operands if x is not value]
        if same(user.shape[at], value.shape[dim]) and all(size_at(x, user, at) == 1 for x in others):
            return at
    raise Unread(f"what becomes of the weights of the top keys ({user.node.name}) is not understood")


def size_at(x: Value, whole: Value, dim: int) -> Dim:
    """The size of an operand along a dimension of the result."""
    position = dim - (len(whole.shape) - len(x.shape))
    return x.shape[position] if position >= 0 else 1


def read_below(space: Space, steps: list[Step], coords: Coords) -> Coords:
    """Coordinates of the last step's element in the ranking's values."""
    for step in reversed(steps):
        value = step.value
        if value.kind == "layout":
            pulled = PULL[value.name](space, value, coords)
            if pulled is None:
                raise Unread("the weights of the top keys are rearranged in a way that cannot be followed")
            coords = pulled
        elif value.kind == "pointwise":
            (x,) = (x for x in value.operands if x is steps[0].value or _is_on(steps, x) or ranked(x, 0) is not None)
            coords = aligned(coords, x)
    return space.resolve_all(coords)


def _is_on(steps: list[Step], x: Value) -> bool:
    return any(step.value is x for step in steps)


def _scattered(end: Value, steps: list[Step], ranking: Ranking) -> tuple[Any, set[Value]]:
    """zeros.scatter(-1, index, w): the weights of all keys."""
    weights = steps[-1].value
    dim = axis(argument(end, "dim", 1), len(end.shape))
    base, index, source = argument(end, "input", 0), argument(end, "index", 2), argument(end, "src", 3)
    if dim is None or source is not weights or argument(end, "reduce", 4) is not None or dim != steps[-1].dim:
        raise Unread("the weights of the top keys are not written to their places")
    if not isinstance(base, Value) or constant_of(base) != 0.0:
        raise Unread("the weights of the top keys are written over others than zeros")
    if end.dtype != weights.dtype or not same_shape(index.shape, weights.shape):
        raise Unread("the weights of the top keys are not written to their places")
    if not all(same(x, y) for d, (x, y) in enumerate(zip(index.shape, end.shape, strict=True)) if d != dim):
        raise Unread("the weights of the top keys are written for a part of the queries")
    space = Space()
    coords = tuple(space.fresh(f"y{d}", size) for d, size in enumerate(end.shape))
    which = space.fresh("m", index.shape[dim])
    inside = (*coords[:dim], which, *coords[dim + 1 :])
    kept = largest_at(space, index, inside, which, coords[dim])
    mine = counted_off(ranking, space, read_below(space, steps, inside), which, coords[dim])
    _check_same(space, kept, mine)
    assert mine is not None
    end.kind, end.name, end.inputs, end.holder = "pointwise", "identity", (weights,), None
    end.attrs = {"fn": lambda x: x}
    return mine.own, {end}


def _check_same(space: Space, kept: Kept | None, mine: Kept | None) -> None:
    if kept is None or mine is None or kept.of is not mine.of or kept.own != mine.own:
        raise Unread("the weights of the top keys are combined with other keys than theirs")
    if space.resolve_all(kept.coords) != space.resolve_all(mine.coords) or not kept.lists_as(mine):
        raise Unread("the weights of the top keys are combined with other keys than theirs")


def gathered(end: Value, last: Step, keys: Dim, which_keys: WhichKeys) -> tuple[Any, set[Value]]:
    """A sum over the top keys of weights times values that were gathered at their positions: (own k, what changed)."""
    weights, dim = last.value, last.dim
    sides = [n for n, x in enumerate(end.inputs) if x is weights]
    labels = end.attrs["lhs"], end.attrs["rhs"]
    if len(sides) != 1:
        raise Unread("both operands of the product come from the same softmax")
    (side,) = sides
    label, values = labels[side][dim], end.inputs[1 - side]
    if label is None or label in end.attrs["out"] or list(labels[1 - side]).count(label) != 1:
        raise Unread("the weights of the top keys are not summed over")
    space = Space()
    at: dict[Any, Coord] = {}
    for n in (0, 1):
        for x, size in zip(labels[n], end.inputs[n].shape, strict=True):
            if x is not None and not at.get(x, ZERO).digits:
                at[x] = space.fresh(f"l{x}", size)
    along, which = space.fresh("j", keys), at[label]
    mine = which_keys(space, coords_of(labels[side], at), which, along)
    found = gather_of(space, values, labels[1 - side].index(label), coords_of(labels[1 - side], at))
    if not same(found.keys, keys):
        raise Unread("what the weights of the top keys are multiplied with has another number of keys")
    _check_same(space, found.kept(space, which, along), mine)
    assert mine is not None
    return mine.own, found.widen()


def coords_of(labels: tuple[Any, ...], at: dict[Any, Coord]) -> Coords:
    """The coordinates of an operand of a product whose dimensions have these labels."""
    return tuple(ZERO if label is None else at[label] for label in labels)
