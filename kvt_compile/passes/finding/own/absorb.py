"""The model's own k-NN selection -> a softmax of all scores that carries its own k; the selection is dead code then.

    x = where(scatter(zeros, topk(t, 5)[1], 1) > 0, t, -inf);  w = softmax(x)     ->     w = softmax(t), own k = 5

Done before anything is searched for, so that the finder reads such a model as it reads any other.  A selection that is
not read stays as it is, with the reason.
"""

from __future__ import annotations

import math
from contextlib import suppress

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Value, same_shape
from kvt_compile.passes.finding.own.again import widen_again
from kvt_compile.passes.finding.own.cases import Cases, Element
from kvt_compile.passes.finding.own.masks import NEVER, mask_in
from kvt_compile.passes.finding.own.order import Function, factor_of
from kvt_compile.passes.finding.own.positive import lasting
from kvt_compile.passes.finding.own.ranking import ranked, ranks
from kvt_compile.passes.finding.own.settle import made_of, settle
from kvt_compile.passes.finding.own.top import of_the_top, size_at, widen
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.site import OwnK


def absorb_selections(graph: CanonicalGraph) -> None:
    """Reads every selection of the graph that is k-NN attention.  Of every other softmax that something was selected
    for, the attribute `unread` says why it is none."""
    rankings = [value for value in graph.values if ranks(value)]
    if not rankings:
        return
    touched = made_of(rankings)
    for value in list(graph.values):
        if value.kind == "pointwise" and value.name == "div" and value in touched and value.users:
            _normalise_again(graph, value, touched)
            if value.kind == "pointwise":
                _normalise_top(graph, value)
        if value.kind == "softmax" and value.inputs[0] in touched and value.users:
            try:
                if of_the_top(value):
                    widen(graph, value)
                else:
                    _Selection(graph, value, touched).absorb()
            except Unread as why:
                value.attrs["unread"] = str(why)
        elif value.kind == "softmax" and value.users:
            with suppress(Unread):  # keys that were gathered by another score are the model's keys
                widen_again(graph, value)
    for value in graph.values:
        if value.kind == "softmax" and any(user in rankings and user.users for user in value.users) and _of_keys(value):
            value.attrs.setdefault("unread", "its largest weights are taken, and not normalised again as a softmax is")


def _of_keys(softmax: Value) -> bool:
    """Whether it is of a product, and not of what a layer made, as where experts are chosen."""
    product = _below_elements(softmax.inputs[0])
    return product.kind == "contraction" and all(_below_elements(x).origin != "parameter" for x in product.operands)


def _below_elements(value: Value) -> Value:
    """What the first operand is of operations on single elements."""
    while value.kind in ("pointwise", "layout") and any(value.operands):
        value = next(value.operands)
    return value


def _normalise_again(graph: CanonicalGraph, value: Value, touched: set[Value]) -> None:
    """w / w.sum(-1, keepdim=True) of softmax weights w that are 0 but for the k largest: their k-NN softmax."""
    weights, total = value.inputs
    if not isinstance(total, Value) or total.kind != "reduce" or total.name != "sum" or not total.attrs["keepdim"]:
        return
    if total.inputs[0] is not weights or len(total.attrs["dims"]) != 1 or value.dtype != weights.dtype:
        return
    (dim,) = total.attrs["dims"]
    space = Space()
    coords = tuple(space.fresh(f"y{d}", size) for d, size in enumerate(value.shape))
    cases = Cases(space, coords[dim], touched)
    try:
        kept, dropped = cases.read(weights, coords)
    except Unread:
        return
    if cases.kept is None or not isinstance(kept, Element) or isinstance(dropped, Element) or dropped != 0.0:
        return
    softmax = kept.value
    if softmax.kind != "softmax" or softmax.attrs["dim"] != dim or not _is_whole(space, kept, coords, value):
        return
    if "own" not in softmax.attrs and cases.same_largest((softmax.inputs[0], kept.coords), cases.kept):
        value.kind, value.name, value.inputs = "softmax", "softmax", softmax.inputs
        value.attrs = {"dim": dim, "own": cases.kept.own}
        value.attrs["selection"] = settle(graph)


def _normalise_top(graph: CanonicalGraph, value: Value) -> None:
    """w / w.sum(-1, keepdim=True) of the k largest softmax weights: the softmax of the k largest scores."""
    top, total = value.inputs
    if not isinstance(top, Value) or not isinstance(total, Value) or total.kind != "reduce" or total.name != "sum":
        return
    ranking = ranked(top, 0)
    if ranking is None or total.inputs[0] is not top or not total.attrs["keepdim"] or value.dtype != top.dtype:
        return
    weights = ranking.of
    whole = weights.kind == "softmax" and weights.attrs["dim"] == ranking.dim and "own" not in weights.attrs
    if not whole or tuple(total.attrs["dims"]) != (ranking.dim,):
        return
    before = value.kind, value.name, value.inputs, value.attrs
    value.kind, value.name, value.inputs, value.attrs = "softmax", "softmax", (top,), {"dim": ranking.dim}
    try:
        widen(graph, value, weights.inputs[0])
    except Unread as why:
        value.kind, value.name, value.inputs, value.attrs = before
        weights.attrs["unread"] = str(why)


def _is_whole(space: Space, scores: Element, coords: Coords, value: Value) -> bool:
    return same_shape(scores.value.shape, value.shape) and space.resolve_all(scores.coords) == space.resolve_all(coords)


class _Selection:
    """What one softmax is of, down to the value that is t for a selected key and -inf for any other."""

    def __init__(self, graph: CanonicalGraph, anchor: Value, touched: set[Value]) -> None:
        self.graph, self.anchor, self.touched = graph, anchor, touched

    def absorb(self) -> None:
        """Makes the softmax one of all scores.  Raises Unread."""
        value, dim, above = self.anchor.inputs[0], self.anchor.attrs["dim"], [self.anchor]
        after: list[Function] = []
        first: Unread | None = None
        while True:
            try:
                scores, own = self._read(value, dim, after, plainly=len(above) == 1)
                break
            except Unread as why:
                first = first or why
                step = self._step(value, dim)
                if step is None:
                    raise first from None
                above.append(value)
                value, dim, function = step
                after += [] if function is None else [function]
        if any(len(x.users) > 1 or x in self.graph.outputs for x in above[1:]):
            raise Unread("the scores with the selection in them are also read by others than the softmax")
        last = above[-1]
        last.inputs = tuple(scores if x is value else x for x in last.inputs)
        self.anchor.attrs["own"] = own
        self.anchor.attrs["selection"] = settle(self.graph)

    def _read(self, value: Value, dim: int, after: list[Function], *, plainly: bool) -> tuple[Value, OwnK]:
        """(t, k) of a value that is t where selected and -inf elsewhere, and goes through functions `after` it."""
        space = Space()
        coords = tuple(space.fresh(f"y{d}", size) for d, size in enumerate(value.shape))
        cases = Cases(space, coords[dim], self.touched)
        scores, dropped = cases.read(value, coords)
        kept = cases.kept
        if kept is None:
            raise Unread("what is selected before the softmax does not decide about single keys of its scores")
        if not isinstance(scores, Element) or isinstance(dropped, Element):
            raise Unread("a selected key does not keep its score, or one that is not selected does")
        if isinstance(dropped, bool) or not dropped <= NEVER:
            raise Unread(f"keys that are not selected get the score {dropped:g}, which is not nothing")
        if not cases.same_largest((scores.value, scores.coords), kept, after):
            raise Unread("the keys are selected by other scores than those of the softmax")
        if not _is_whole(space, scores, coords, value):
            raise Unread("the scores are rearranged between the selection and the softmax")
        if not math.isinf(dropped):
            self._check_few_keys(scores.value, dropped, plainly)
        return scores.value, kept.own

    def _check_few_keys(self, scores: Value, fill: float, plainly: bool) -> None:
        """A finite score for keys that are not selected is nothing only where a row has keys with real scores."""
        if not plainly:
            raise Unread(f"keys that are not selected get {fill:g} and not -inf, and the scores are changed after it")
        if (mask := mask_in(scores, fill)) is not None:
            raise Unread(
                f"keys that are not selected get {fill:g} and not -inf: a row whose keys are all masked, or as low as "
                f"that (by {mask.node.name}), attends to them"
            )

    def _step(self, value: Value, dim: int) -> tuple[Value, int, Function | None] | None:
        """(what a value is of, its axis of keys, the function) where it leaves -inf as it is, and the order of all
        others."""
        if value.kind == "layout" and value.name in ("reshape", "permute"):
            space = Space()
            coords = tuple(space.fresh(f"y{d}", size) for d, size in enumerate(value.shape))
            below = PULL[value.name](space, value, coords)
            if below is None:
                return None
            at = [d for d, c in enumerate(space.resolve_all(below)) if c == space.resolve(coords[dim])]
            return (value.inputs[0], at[0], None) if len(at) == 1 else None
        if value.kind != "pointwise":
            return None
        if value.name == "identity" and isinstance(value.inputs[0], Value):
            x = value.inputs[0]
            floats = x.dtype is not None and value.dtype is not None and value.dtype.is_floating_point
            return (x, dim, None) if floats and x.dtype is not None and x.dtype.is_floating_point else None
        if value.name not in ("mul", "div"):
            return None
        sides = [x for x in value.inputs if isinstance(x, Value) and x in self.touched]
        if len(sides) != 1 or (value.inputs[0] is not sides[0] and value.name == "div"):
            return None
        other = value.inputs[1] if value.inputs[0] is sides[0] else value.inputs[0]
        if not same_shape(sides[0].shape, value.shape):
            return None
        one_a_row = not isinstance(other, Value) or size_at(other, value, dim) == 1
        return (sides[0], dim, factor_of(value, other)) if one_a_row and lasting(other, value.dtype) else None


def selection_between(first: Value, last: Value) -> Value | None:
    """An operation that ranks what is made of `first`, and that `last` is made with."""
    found: list[Value] = []
    queue, seen = [first], {first}
    while queue:
        for user in queue.pop().users:
            if user not in seen and user.index < last.index and user.kind not in ("contraction", "sdpa"):
                seen.add(user)
                queue.append(user)
                if ranks(user):
                    found.append(user)
    ends = {last, *last.operands}
    return next((value for value in sorted(found, key=lambda v: v.index) if ends & made_of([value])), None)
