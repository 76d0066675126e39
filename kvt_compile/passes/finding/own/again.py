"""Scores that are computed a second time, of gathered keys alone -> a softmax of all scores with an own k.

    index = topk(q @ kT, 5)[1];  softmax(q . k[index]) @ v[index]     ->     softmax(q @ kT) @ v, own k = 5

Where the scores that rank are those that are computed again but for a positive factor, the selected keys are the k
best of all; keys that another score selects are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.values import Value, same
from kvt_compile.passes.finding.own.alike import alike
from kvt_compile.passes.finding.own.gathers import Gather, gather_of
from kvt_compile.passes.finding.own.order import Function, Place, factor_of, ordered_by
from kvt_compile.passes.finding.own.positive import positive
from kvt_compile.passes.finding.own.ranking import Kept, pulled
from kvt_compile.passes.finding.own.settle import settle
from kvt_compile.passes.finding.own.steps import Step, make_wide
from kvt_compile.passes.finding.own.top import back, coords_of, factors_of, gathered, read_below, steps_ahead
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.reading.read import aligned


def widen_again(graph: CanonicalGraph, anchor: Value) -> None:
    """Makes it a softmax of all scores, where its own are computed of the keys with the k best.  Raises Unread."""
    way = _to_product(graph, anchor)
    product, dim = way[0].value, way[0].dim
    keys_of = _Keys(product, dim)
    space = Space()
    out = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(product.shape))
    found = keys_of.read(space, out)
    along = space.fresh("j", found.keys)
    kept = found.kept(space, out[dim], along)
    if kept is None or not keys_of.ranks_the_same(space, out, found, kept, along, factors_of(way[1:])):
        raise Unread("the keys are selected by other scores than those of the softmax")
    ahead = steps_ahead(graph, anchor)
    end = ahead[-1].value.users[0]
    if end.kind != "contraction":
        raise Unread(f"what becomes of the weights of the top keys ({end.node.name}) is not understood")
    steps = [*way, *ahead]

    def mine(space: Space, coords: Coords, which: Coord, along: Coord) -> Kept | None:
        return keys_of.read(space, read_below(space, steps, coords)).kept(space, which, along)

    own, changed = gathered(end, ahead[-1], found.keys, mine)
    changed |= found.widen() | {step.value for step in steps}
    for step in steps:
        make_wide(step, found.keys)
    anchor.attrs["own"] = own
    anchor.attrs["selection"] = settle(graph) | changed | set(_left_over(graph, changed))


def _left_over(graph: CanonicalGraph, changed: set[Value]) -> Iterator[Value]:
    """Products without their sum, (q * k[index]).sum(-1), which nobody reads since the sum is a product of its own."""
    for value in graph.values:
        unread = not value.users and value not in graph.outputs
        if unread and value.kind == "pointwise" and any(x in changed for x in value.operands):
            yield value


def _to_product(graph: CanonicalGraph, anchor: Value) -> list[Step]:
    """From the product that made the scores to what the softmax is of, and their dimension of the keys."""
    value, dim = anchor.inputs[0], anchor.attrs["dim"]
    way = [Step(value, dim)]
    while value.kind != "contraction":
        step = back(value, dim)
        if step is None or len(value.users) != 1 or value in graph.outputs:
            raise Unread("the scores are no product of queries and gathered keys")
        value, dim = step
        way.insert(0, Step(value, dim))
    if len(value.users) != 1 or value in graph.outputs:
        raise Unread("the scores of the gathered keys are read at several places")
    return way


class _Keys:
    """The gathered operand of the product that made the scores."""

    def __init__(self, product: Value, dim: int) -> None:
        self.product = product
        self.labels = product.attrs["lhs"], product.attrs["rhs"]
        self.label = product.attrs["out"][dim]
        sides = [n for n in (0, 1) if list(self.labels[n]).count(self.label) == 1]
        if len(sides) != 1 or self.label is None:
            raise Unread("the scores are no product of queries and gathered keys")
        (self.side,) = sides

    def _at(self, space: Space, out: Coords) -> tuple[Coords, Coords]:
        """Coordinates of both operands.  Raises Unread unless they are summed over one axis."""
        at = dict(zip(self.product.attrs["out"], out, strict=True))
        (summed,) = _summed(self.product)
        side, other = self.labels
        at[summed] = space.fresh("d", self.product.inputs[0].shape[list(side).index(summed)])
        return coords_of(side, at), coords_of(other, at)

    def read(self, space: Space, out: Coords) -> Gather:
        self.operands = self._at(space, out)
        position = list(self.labels[self.side]).index(self.label)
        return gather_of(space, self.product.inputs[self.side], position, self.operands[self.side])

    def ranks_the_same(
        self, space: Space, out: Coords, found: Gather, kept: Kept, along: Coord, after: list[Function]
    ) -> bool:
        """Whether what ranks is the product of the same queries with the same keys, all of them.  `after` is what the
        scores are multiplied with after their product."""
        order = ordered_by(space, kept.of, kept.coords, along)
        other, at = order.of
        if other.kind != "contraction":
            return False
        known = dict(zip(other.attrs["out"], at, strict=True))
        (mine,), (theirs,) = _summed(self.product), _summed(other)
        labels = other.attrs["lhs"], other.attrs["rhs"]
        features = self.operands[self.side][list(self.labels[self.side]).index(mine)]
        if not same(other.inputs[0].shape[list(labels[0]).index(theirs)], space.size(features)):
            return False
        known[theirs] = features
        left, right = (_bottom(space, x, coords_of(labels[n], known)) for n, x in enumerate(other.inputs))
        query = _bottom(space, self.product.inputs[1 - self.side], self.operands[1 - self.side])
        key = _bottom(space, found.base, found.below(along))
        if {left[0], right[0]} != {query[0], key[0]}:
            return False
        return alike((*order.functions, *left[1], *right[1]), (*after, *query[1], *key[1]))


def _summed(product: Value) -> tuple[object]:
    left, right, out = (product.attrs[name] for name in ("lhs", "rhs", "out"))
    summed = [x for x in left if x is not None and x in right and x not in out]
    if len(summed) != 1 or any(x not in (*out, None, *summed) for x in (*left, *right)):
        raise Unread("queries and keys are not multiplied over one axis")
    return (summed[0],)


def _bottom(space: Space, value: Value, coords: Coords) -> tuple[Place, list[Function]]:
    """The element below rearrangements and positive factors that all elements share, detached or not, and these."""
    factors: list[Function] = []
    while True:
        value, coords = pulled(space, value, coords)
        if value.kind != "pointwise" or value.name not in ("mul", "div") or not positive(value.inputs[1]):
            return (value, coords), factors
        x, factor = value.inputs
        if not isinstance(x, Value) or (isinstance(factor, Value) and any(size != 1 for size in factor.shape)):
            return (value, coords), factors
        factors.append(factor_of(value, factor))
        value, coords = x, aligned(coords, x)
