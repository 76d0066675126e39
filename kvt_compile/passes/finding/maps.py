"""Product -> anything that keeps its axes, but no softmax -> product: a refusal that says what the weights are.

    q @ kT -> exp(s) / (1 + sum(exp(s))) -> @ v       q @ kT -> sigmoid(s) -> @ v       q @ kT -> s -> @ v

Without a softmax there is no anchor to start at, so this starts at the second product.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Space
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.describe import place
from kvt_compile.passes.finding.formula import formula
from kvt_compile.passes.reading.axes import is_pointwise
from kvt_compile.passes.reading.facts import Facts
from kvt_compile.passes.reading.passing import contraction_inputs, passed_inputs
from kvt_compile.passes.reading.read import Reader
from kvt_compile.passes.site import Refusal

_ELEMENTS = ("pointwise", "layout", "select_by", "border")
_ROWS = frozenset({"normalize", "layer_norm", "rms_norm", "nan_to_num", "detach", "softplus", "elu", "gelu", "cumsum"})
"""Operations that are no expression and keep the axes of a map."""
_NORMS = ("norm", "normalize", "linalg_vector_norm", "vector_norm", "linalg_norm")
_FAR = 6
"""Steps behind the second product in which its rows may be divided by their sums."""


@dataclass(frozen=True)
class Map:
    """What stands between two products."""

    product: Value
    side: int
    """Of the second product: which operand is the weights."""
    scores: Value
    """The first product."""

    @property
    def weights(self) -> Value:
        found: Value = self.product.inputs[self.side]
        return found


@dataclass
class _Sweep:
    """One way through the graph: what is made of a product without a softmax, and what of a softmax."""

    scores: dict[Value, Value] = field(default_factory=dict)
    softened: set[Value] = field(default_factory=set)

    def step(self, value: Value, softmax_like: bool) -> Iterator[Map]:
        operands = list(value.operands)
        soft = softmax_like or any(x in self.softened for x in operands)
        if value.kind == "contraction":
            if value.attrs["mixing"] or soft:
                return
            yield from (
                Map(value, side, self.scores[x])
                for side, x in enumerate(value.inputs)
                if x in self.scores and not same_operands(value)
            )
            self.scores[value] = value
            return
        if soft:
            self.softened.add(value)
        keeps = value.kind in _ELEMENTS or (
            value.kind == "opaque" and (value.name in _ROWS or is_pointwise(value.name))
        )
        made = [self.scores[x] for x in operands if x in self.scores]
        if keeps and made and not soft:
            self.scores[value] = made[0]


def same_operands(product: Value) -> bool:
    """Whether a product is one of a value with itself, as of a matrix squared."""
    left, right = product.inputs
    return left is right


def find_maps(graph: CanonicalGraph, facts: Facts, is_anchor: Callable[[Value], bool]) -> list[Map]:
    """Every map between two products of computed tensors that no softmax takes part in."""
    sweep = _Sweep()
    found: list[Map] = []
    for value in graph.values:
        found += [x for x in sweep.step(value, is_anchor(value)) if _is_map(graph, facts, x, sweep.scores)]
    return list({x.product: x for x in reversed(found)}.values())[::-1]


def _is_map(graph: CanonicalGraph, facts: Facts, found: Map, on_the_way: Container[Value]) -> bool:
    """Whether the second product sums over an axis that one operand of the first brought in alone: its keys."""
    product = found.product
    if (not product.users and product not in graph.outputs) or product.inputs[1 - found.side] not in facts.computed:
        return False
    space = Space()
    out = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(product.shape))
    operands = contraction_inputs(space, product, out)
    reader = Reader(space, lambda v: v.kind != "contraction", facts.cost, stops=frozenset({found.scores}))
    reader.read(*operands[found.side])
    summed = (space.atoms_of(operands[0][1]) & space.atoms_of(operands[1][1])) - space.atoms_of(out)
    for leaf in reader.leaves:
        if leaf.value.kind == "opaque" and leaf.value in on_the_way:
            return True  # its axes cannot be followed, and it is said rather than not
        if leaf.value is found.scores:
            inner = passed_inputs(space, found.scores, leaf.coords) or []
            have = [summed & space.atoms_of(at) for _, at in inner]
            if len(have) == 2 and any(have) and not all(have):
                return True
    return False


def refusal_of(found: Map) -> Refusal:
    """What is read between the products, and why it stays."""
    weights, node = found.weights, found.product.node
    anchor = weights if weights.kind != "contraction" else found.product
    return Refusal(anchor.node, place(node), reason_of(found), "weights", node, anchor)


def reason_of(found: Map) -> str:
    """The formula between the products, and why it is no softmax."""
    weights = found.weights
    text = formula(weights, {found.scores: "s"})
    if (block := block_of(found)) is not None:
        return (
            f"between the products stands {text}: a block of rows that are normalised only after {block.node.name} "
            "adds those of other blocks, so no row is there as a whole to be selected from"
        )
    later = normalised_later(found)
    shown = text if later is None else formula(later, {found.scores: "s", found.product: f"({text} @ v)"})
    normalised = _has_reduction(weights, found.scores) or later is not None
    if normalised:
        return f"between the products stands {shown}: its rows are normalised, but not as a softmax of the scores s is"
    return (
        f"between the products stands {shown}: nothing that is understood normalises its rows, so the keys that a row "
        "keeps would not make up for those it leaves out"
    )


def _has_reduction(value: Value, stop: Value) -> bool:
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        if here.kind == "reduce" or (here.kind == "opaque" and here.name in _NORMS):
            return True
        if here.kind == "pointwise" and here.name in ("div", "reciprocal") and _reaches(here.inputs[-1], stop):
            return True
        if here is not stop and here.kind in (*_ELEMENTS, "opaque"):
            queue += [x for x in here.operands if x not in seen]
            seen.update(here.operands)
    return False


def normalised_later(found: Map) -> Value | None:
    """What divides the product, or multiplies it, by something made of the same scores."""
    value = found.product
    for _ in range(_FAR):
        users = [user for user in value.users if user.kind in ("pointwise", "layout")]
        if len(users) != 1:
            return None
        (user,) = users
        others = [x for x in user.operands if x is not value]
        if user.kind == "pointwise" and user.name in ("div", "mul") and any(_reaches(x, found.scores) for x in others):
            return user
        value = user
    return None


def block_of(found: Map) -> Value | None:
    """Where the product is added to one of other scores before both are normalised: a softmax that is computed in
    blocks of keys, (exp(s1 - m) @ v1 * a + exp(s2 - m) @ v2) / l."""
    value, added = found.product, None
    for _ in range(2 * _FAR):
        users = [user for user in value.users if user.kind in ("pointwise", "layout")]
        if len(users) != 1:
            return None
        (user,) = users
        others = [x for x in user.operands if x is not value]
        if user.kind == "pointwise" and user.name == "add" and any(_has_product(x) for x in others):
            added = user
        if added is not None and (
            (user.name == "div" and user.inputs[0] is value)
            or (user.name == "mul" and any(x.name in ("div", "reciprocal") for x in others))
        ):
            return added
        value = user
    return None


def _has_product(value: Value) -> bool:
    """Whether a value is a product of two computed tensors, but for what is pointwise."""
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        if here.kind == "contraction":
            if not here.attrs["mixing"]:
                return True
        elif here.kind in ("pointwise", "layout"):
            queue += [x for x in here.operands if x not in seen]
            seen.update(here.operands)
    return False


def _reaches(value: object, scores: Value) -> bool:
    """Whether a value is made of the scores."""
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        if here is scores:
            return True
        if isinstance(here, Value) and here.index > scores.index and len(seen) < 100:
            queue += [x for x in here.operands if x not in seen]
            seen.update(here.operands)
    return False
