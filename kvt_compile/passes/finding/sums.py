"""A product whose weights are a sum of maps -> its terms, so that each map can have a product of its own.

    (a1 - lam*a2) @ v                        ->   a1 @ v - (lam*a2) @ v
    w = (1-g)*a + g*b;  w / w.sum(-1) @ v    ->   ((1-g)*a / n) @ v + (g*b / n) @ v,   n = (1-g) + g

A product is linear in its weights.  The sum of a row of a softmax is 1, whichever of its keys are kept, so a sum of
softmaxes with factors that do not vary along a row is normalised by the sum of those factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Coord, Space
from kvt_compile.passes.canonical.spellings import read_call
from kvt_compile.passes.canonical.values import Value, broadcasts, is_number, same_shape
from kvt_compile.passes.canonical.versions import mutates
from kvt_compile.passes.reading.read import Reader, aligned

MOST_TERMS = 4
"""Each term is an attention of its own: beyond, the map is worth making once."""


@dataclass(frozen=True)
class Scaled:
    """Times, or over, what one of the model's nodes holds, or a number."""

    by: Value | float
    divides: bool


@dataclass(frozen=True)
class Rearranged:
    """What `node` does to the tensor that `old` holds."""

    node: fx.Node
    old: fx.Node


@dataclass(frozen=True)
class Normalised:
    """Over the sum of the factors of all terms, and a number."""

    factors: tuple[tuple[bool, tuple[Scaled, ...]], ...]
    """Of each term: whether it is subtracted, and what it is scaled by."""
    plus: float


Step = Scaled | Rearranged | Normalised | torch.dtype


@dataclass(frozen=True)
class Term:
    """One map, and what is done to it before the product, first things first."""

    map: Value
    negative: bool = False
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> Term:
        return replace(self, steps=(*self.steps, step))


@dataclass(frozen=True)
class SumOfMaps:
    product: Value
    weights: fx.Node
    """What the product's node reads, and its terms will read instead."""
    terms: tuple[Term, ...]
    dead: tuple[fx.Node, ...]
    """What only made the sum."""


def find_sums(graph: CanonicalGraph, modules: dict[str, nn.Module]) -> list[SumOfMaps]:
    """Every product with a sum of maps, one of them a softmax, that can be written as a sum of products."""
    soft = _made_of_softmaxes(graph)
    found = []
    for product in graph.values:
        if product.kind != "contraction" or product.holder is not product.node:
            continue
        sides = [x for x in product.inputs if x in soft]
        if len(sides) == 1 and (one := _sum_of(graph, soft, modules, product, sides[0])) is not None:
            found.append(one)
    return found


def _made_of_softmaxes(graph: CanonicalGraph) -> set[Value]:
    soft: set[Value] = set()
    for value in graph.values:
        elements = value.kind in ("pointwise", "layout", "reduce")
        if value.kind == "softmax" or (elements and any(x in soft for x in value.operands)):
            soft.add(value)
    return soft


def _sum_of(
    graph: CanonicalGraph, soft: set[Value], modules: dict[str, nn.Module], product: Value, weights: Value
) -> SumOfMaps | None:
    node = product.node
    while weights.kind == "layout" and weights.node is node:
        weights = weights.inputs[0]
    if (place := _place_of(weights, node)) is None:
        return None
    walk = _Walk(graph, soft, modules, product)
    terms = walk.split(weights)
    if terms is None or len(terms) > MOST_TERMS or not walk.whole():
        return None
    return SumOfMaps(product, place, tuple(terms), tuple(dict.fromkeys(walk.nodes())))


def _place_of(read: Value, node: fx.Node) -> fx.Node | None:
    """By which node a call reads a value, where the same call with another tensor in its place is the same function of
    that; None where not."""
    listed: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), listed.append)
    places = [x for x in listed if x in (read.holder, read.node)]  # what was written in place has two names
    called = node.op in ("call_function", "call_method") and not mutates(node)
    return places[0] if called and read.holder is not None and len(places) == 1 else None


@dataclass
class _Walk:
    """From the weights of one product backwards to its maps."""

    graph: CanonicalGraph
    soft: set[Value]
    modules: dict[str, nn.Module]
    product: Value
    passed: list[Value] = field(default_factory=list)

    def split(self, value: Value) -> list[Term] | None:
        """The terms of a value; None where it is no sum."""
        if self.graph.modes[value.node] != self.graph.modes[self.product.node]:
            return None
        terms = self._layout(value) if value.kind == "layout" else self._pointwise(value)
        if terms is not None:
            self.passed.append(value)
        return terms

    def whole(self) -> bool:
        """Whether nobody else reads what is written over, so that the writes can go with their readers."""
        gone = {*self.nodes(), self.product.node}
        return all(x.expired is None or gone.issuperset(x.node.users) for x in self.passed)

    def nodes(self) -> Iterator[fx.Node]:
        return (value.node for value in self.passed)

    def _pointwise(self, value: Value) -> list[Term] | None:
        if value.kind != "pointwise":
            return None
        inputs = value.inputs
        if value.name in ("add", "sub") and all(self._is_part(x, value) for x in inputs):
            left, right = (self.split(x) or self._leaf(x) for x in inputs)
            if left is None or right is None:
                return None
            flip = value.name == "sub"
            return left + [replace(term, negative=term.negative != flip) for term in right]
        if value.name == "identity" and same_shape(inputs[0].shape, value.shape) and value.dtype is not None:
            return self._each(inputs[0], () if value.dtype == inputs[0].dtype else (value.dtype,))
        if value.name == "neg":
            inner = self.split(inputs[0])
            return None if inner is None else [replace(term, negative=not term.negative) for term in inner]
        if value.name in ("mul", "div"):
            return self._scaled(value)
        return None

    def _scaled(self, value: Value) -> list[Term] | None:
        divides = value.name == "div"
        for x, by in (value.inputs, value.inputs[::-1])[: 1 if divides else 2]:
            if not self._is_part(x, value):
                continue
            if isinstance(by, Value) and by in self.soft:
                return self._normalised(value, x, by) if divides else None
            if not isinstance(by, Value) or (self._stays(by) and not is_number(by)):
                return self._each(x, (Scaled(by, divides),))
        return None

    def _each(self, value: Value, steps: tuple[Step, ...]) -> list[Term] | None:
        terms = self.split(value)
        return None if terms is None else [replace(term, steps=(*term.steps, *steps)) for term in terms]

    def _layout(self, value: Value) -> list[Term] | None:
        inner = value
        while inner.kind == "layout" and inner.node is value.node:
            inner = inner.inputs[0]
        place = _place_of(inner, value.node)
        if place is None or value.holder is not value.node:
            return None
        terms = self._each(inner, (Rearranged(value.node, place),))
        return terms if terms is not None and all(same_shape(term.map.shape, inner.shape) for term in terms) else None

    def _is_part(self, x: object, whole: Value) -> bool:
        """Whether it is a map with the axes of the whole, or broadcast to its batches and heads."""
        if not isinstance(x, Value) or x not in self.soft or x.dtype != whole.dtype:
            return False
        rows_and_keys = len(x.shape) > 1 and same_shape(x.shape[-2:], whole.shape[-2:])
        return rows_and_keys and broadcasts(x.shape, whole.shape)

    def _leaf(self, value: Value) -> list[Term] | None:
        return [Term(value)] if self._stays(value) else None

    def _stays(self, value: Value) -> bool:
        """Whether a node holds it up to the product."""
        late = value.expired is not None and value.expired <= self.product.index
        return value.holder is not None and not late

    # ---- sums of rows ----------------------------------------------------------------------------------------------

    def _normalised(self, value: Value, x: Value, by: Value) -> list[Term] | None:
        """x / (x.sum(-1, True) + eps): over the sum of the factors."""
        plus, total, between = 0.0, by, [by]
        while total.kind == "layout" or (total.kind == "pointwise" and total.name in ("add", "identity")):
            inner = list(total.operands)
            if len(inner) != 1:
                return None
            plus += sum(y for y in total.inputs if not isinstance(y, Value))
            total = inner[0]
            between.append(total)
        if total.kind != "reduce" or total.name != "sum" or total.inputs[0] is not x or total.dtype != x.dtype:
            return None
        if len(total.attrs["dims"]) != 1 or value.dtype != x.dtype:
            return None
        dim = total.attrs["dims"][0] % len(x.shape)
        terms = self.split(x) or self._leaf(x)
        if terms is None or not self._is_row_sum(value, by, total, dim):
            return None
        factors = [self._factors(term, x, dim) for term in terms]
        known = tuple(y for y in factors if y is not None)
        if len(known) < len(factors):
            return None
        self.passed += between
        return [term.then(Normalised(known, float(plus))) for term in terms]

    def _is_row_sum(self, value: Value, by: Value, total: Value, dim: int) -> bool:
        """Whether each element is divided by the sum of its own row."""
        space = Space()
        frame = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(value.shape))
        reader = Reader(space, _is_no_product, {}, stops=frozenset({total}))
        reader.read(by, aligned(frame, by))
        if len(reader.leaves) != 1 or reader.leaves[0].value is not total:
            return False
        read = space.resolve_all(reader.leaves[0].coords)
        own = [c for d, c in enumerate(space.resolve_all(frame)) if d != dim]
        return [c for d, c in enumerate(read) if not (total.attrs["keepdim"] and d == dim)] == own

    def _factors(self, term: Term, whole: Value, dim: int) -> tuple[bool, tuple[Scaled, ...]] | None:
        """What a row of the term sums up to; None where that depends on its elements."""
        steps = [step for step in term.steps if isinstance(step, Scaled)]
        map_, more = self._scales_of(term.map, dim)
        steps = [*more, *steps]
        if len(steps) < len(term.steps) + len(more) or not self._sums_to_one(map_, whole, dim):
            return None
        scales = (step.by for step in steps if isinstance(step.by, Value))
        return (term.negative, tuple(steps)) if all(_size(x, whole, dim) == 1 for x in scales) else None

    def _scales_of(self, value: Value, dim: int) -> tuple[Value, list[Scaled]]:
        """The map below the factors that a term is itself made with: (1-g)*a."""
        steps: list[Scaled] = []
        while value.kind == "pointwise" and value.name in ("mul", "div"):
            parts = [n for n, x in enumerate(value.inputs) if self._is_part(x, value)]
            if len(parts) != 1 or (value.name == "div" and parts != [0]):
                break
            by = value.inputs[1 - parts[0]]
            if isinstance(by, Value) and (by in self.soft or not self._stays(by) or is_number(by)):
                break
            steps.insert(0, Scaled(by, value.name == "div"))
            value = value.inputs[parts[0]]
        return value, steps

    def _sums_to_one(self, map_: Value, whole: Value, dim: int) -> bool:
        """Whether a row of it is one of a softmax, which has no zeros where no key is valid but NaN."""
        space = Space()
        frame = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(whole.shape))
        softmaxes = frozenset(x for x in self.graph.values if x.kind == "softmax")
        reader = Reader(space, _is_no_product, {}, stops=softmaxes)
        expression = reader.read(map_, aligned(frame, map_))
        if [leaf.symbol for leaf in reader.leaves] != [expression]:
            return False  # more than a rearrangement stands between
        found = reader.leaves[0].value
        if found.kind != "softmax":
            return False
        call = read_call(found.node, self.modules)
        at = space.resolve_all(reader.leaves[0].coords)
        along: Coord = at[found.attrs["dim"]]
        rest = {a for d, c in enumerate(at) if d != found.attrs["dim"] for a in c.digits}
        return (
            call is not None
            and call.name == "softmax"
            and along == space.resolve(frame[dim])
            and not rest & set(along.digits)
        )


def _is_no_product(value: Value) -> bool:
    """What a reading may pass on the way to a softmax: which products mix tokens is not known yet, and a map that comes
    out of one is none that sums to one."""
    return value.kind != "contraction"


def _size(x: Value, whole: Value, dim: int) -> object:
    """The size of an operand along a dimension of what it is broadcast to."""
    at = dim - (len(whole.shape) - len(x.shape))
    return 1 if at < 0 else x.shape[at]
