"""A softmax between two products -> a site, or the nearest miss.  Both ways are read from the softmax.

q, k --contraction--> scores --pointwise/layout--> softmax --pointwise/layout--> --contraction with v--> out
       \\______________ read backwards ____________/  \\________ found forwards, read backwards ________/
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.made import can_be_read, held
from kvt_compile.passes.canonical.values import Value, same
from kvt_compile.passes.finding.assemble import Assembled, Reading, assemble
from kvt_compile.passes.finding.closed import closed_interior, unfed
from kvt_compile.passes.finding.dead import fills_dead_rows
from kvt_compile.passes.finding.describe import describe_fused, describe_kept
from kvt_compile.passes.finding.miss import DEAD_ROWS, NEAR, ONE_KEY, OWN_SELECTION, UNFED, WIDE, Miss, not_tokens
from kvt_compile.passes.finding.own.absorb import selection_between
from kvt_compile.passes.reading.facts import Facts, may_ask
from kvt_compile.passes.reading.invariance import without_row_constants
from kvt_compile.passes.reading.origin import keys_from
from kvt_compile.passes.reading.passing import contraction_inputs
from kvt_compile.passes.reading.provenance import kind_of_attention, kind_of_axis
from kvt_compile.passes.reading.read import Leaf, Reader, accumulation
from kvt_compile.passes.reading.wide import needs_float64
from kvt_compile.passes.site import AttentionSite, ScoresKept


@dataclass(frozen=True)
class _Consumer:
    """A product that the softmax's weights go into, and on which side."""

    product: Value
    side: int


def read_softmax(graph: CanonicalGraph, facts: Facts, anchor: Value) -> tuple[list[AttentionSite], Miss | None]:
    if anchor.shape[anchor.attrs["dim"]] == 1:
        return [], Miss("values", anchor, ONE_KEY)
    if not anchor.users and anchor not in graph.outputs:
        whole = anchor.attrs.get("within")
        if isinstance(whole, Value) and (whole.users or whole in graph.outputs):
            return [], None  # a part of another softmax, which is an anchor of its own
        return [], Miss("values", anchor, "nobody reads what is computed of it")
    consumers, others = _consumers(graph, anchor)
    if not consumers:
        return [], Miss("values", anchor, _no_product(anchor))
    sites: list[AttentionSite] = []
    misses: list[Miss] = []
    kept: AttentionSite | None = None
    attempts: list[_Attempt] = []
    for consumer in consumers:
        attempt = _Attempt(graph, facts, anchor, consumer)
        try:
            attempt.read()
        except Miss as miss:
            misses.append(miss)
        else:
            attempts.append(attempt)
    if len(attempts) == len(consumers):
        _tell_each_other(attempts)
    for attempt in attempts:
        try:
            if others:
                reader = "the model's output" if others[0] in graph.outputs else others[0].node.name
                raise Miss("closed", anchor, f"the attention weights are also read by {reader}")
            sites.append(attempt.fused())
        except Miss as miss:
            misses.append(miss)
            kept = kept or attempt.kept(miss)
    if kept is not None:  # one reader needs the map: compute it once, for all of them
        return [kept], None
    if sites and len(sites) == len(consumers):
        return sites, None
    nearest = max(misses, key=lambda miss: NEAR.index(miss.step))
    if nearest.step in ("scores", "values") and "unread" in anchor.attrs and anchor.inputs[0] in facts.widely:
        nearest = Miss("selection", anchor, OWN_SELECTION.format(anchor.attrs["unread"]))
    return [], nearest


def _tell_each_other(attempts: list[_Attempt]) -> None:
    """Products that read parts of a softmax that have no element in common are sites of their own, such as the two
    halves of the heads of differential attention.  A map that several read is worth making once."""
    ways = [_ways(attempt.leaf_of_product.value, attempt.product) for attempt in attempts]
    for one in attempts:
        if all(other is one or one.is_apart_from(other) for other in attempts):
            one.beside = frozenset().union(*(way for n, way in enumerate(ways) if attempts[n] is not one))


def _differ(x: Coord, y: Coord) -> bool:
    """Whether two coordinates of one dimension are never equal: one digit of theirs is another constant."""
    if not x.plain or not y.plain:
        return False
    for a, b in zip(reversed(x.digits), reversed(y.digits), strict=False):
        if not same(a.size, b.size):
            return False
        if a.fixed is not None and b.fixed is not None and a.fixed != b.fixed:
            return True
    return False


def _ways(first: Value, last: Value) -> set[Value]:
    """What lies on a way from one product to the other, and the other."""
    made, found = _descendants(first, stop=last), {last}
    queue = [last]
    while queue:
        more = [x for x in queue.pop().operands if x in made and x not in found]
        found.update(more)
        queue += more
    return found


def _no_product(anchor: Value) -> str:
    """Why no product with values was found: the weights may be multiplied with a parameter instead."""
    queue, seen = [anchor], {anchor}
    while queue:
        here = queue.pop()
        if here.kind == "contraction":
            return "its weights are not multiplied with values, but with a parameter"
        if here is anchor or here.kind in ("pointwise", "layout"):
            queue += [x for x in here.users if x not in seen]
            seen.update(here.users)
    return "its weights are not multiplied with values by a matrix product"


def _consumers(graph: CanonicalGraph, anchor: Value) -> tuple[list[_Consumer], list[Value]]:
    """Products reached from the softmax through anything that keeps its axes, and every other reader."""
    consumers: list[_Consumer] = []
    others: list[Value] = []
    seen: set[Value] = {anchor}
    queue = [anchor]
    if anchor in graph.outputs:
        others.append(anchor)
    while queue:
        value = queue.pop(0)
        for user in value.users:
            if user.kind == "contraction" and not user.attrs["mixing"]:
                found = (_Consumer(user, side) for side, x in enumerate(user.inputs) if x is value)
                consumers += [consumer for consumer in found if consumer not in consumers]
            elif user not in seen:
                seen.add(user)
                if user.kind in ("softmax", "sdpa", "source") or len(seen) > 200:
                    others.append(user)
                    continue
                queue.append(user)
                if not user.users or user in graph.outputs:
                    others.append(user)
    return consumers, others


class _Attempt:
    """One softmax with one product that consumes its weights."""

    def __init__(self, graph: CanonicalGraph, facts: Facts, anchor: Value, consumer: _Consumer) -> None:
        self.graph, self.facts, self.anchor, self.product, self.side = (
            graph, facts, anchor, consumer.product, consumer.side,
        )  # fmt: skip
        self.space = Space()
        self.beside: frozenset[Value] = frozenset()

    def is_apart_from(self, other: _Attempt) -> bool:
        """Whether both read the softmax, at different places of one of its dimensions."""
        mine, theirs = (x.space.resolve_all(x.leaf.coords) for x in (self, other))
        return any(map(_differ, mine, theirs))

    def read(self) -> None:
        """Reads weights and scores; raises Miss when this is not attention at all."""
        space, anchor, product = self.space, self.anchor, self.product
        self.out = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(product.shape))
        operands = contraction_inputs(space, product, self.out)
        weights, weights_at = operands[self.side]
        self.value = operands[1 - self.side]
        if (filled := fills_dead_rows(anchor, product)) is not None:
            raise Miss("values", filled, DEAD_ROWS.format(filled.node.name))
        after = _descendants(anchor, stop=product)
        if self.value[0] is anchor or self.value[0] in after:
            raise Miss("values", product, "both operands of the product come from the same softmax")
        reader = Reader(space, lambda v: v in after, self.facts.cost, stops=frozenset({anchor}))
        self.weights_at = weights, weights_at
        reader.read(weights, weights_at)
        self.weights_reader = reader
        self.dim = anchor.attrs["dim"]
        self.leaf = self._weights_leaf(reader, self._summed(operands))
        self._read_scores(space.resolve_all(self.leaf.coords))
        self._refuse_selections()

    def _refuse_selections(self) -> None:
        """What the model selects by itself is k-NN attention and was read as that, or nothing is selected on top."""
        ranking = selection_between(self.leaf_of_product.value, self.product)
        if ranking is not None:
            why = self.anchor.attrs.get("unread") or f"{ranking.name} decides about its weights"
            raise Miss("selection", ranking, OWN_SELECTION.format(why))

    def _weights_leaf(self, reader: Reader, summed: set[object]) -> Leaf:
        """The softmax, read where its axis is the one the product sums over."""
        at = [leaf for leaf in reader.leaves if leaf.value is self.anchor]
        if not at:
            raise Miss("values", self.product, "the attention weights do not reach the product axis by axis")
        coords = [self.space.resolve_all(leaf.coords)[self.dim].digits for leaf in at]
        shared = [leaf for leaf, digits in zip(at, coords, strict=True) if digits and set(digits) <= summed]
        if not shared:
            reason = "the softmax axis is not the axis the product with the values sums over"
            raise Miss("values", self.product, reason)
        self.places = len(at)
        return shared[0]

    def _read_scores(self, coords: Coords) -> None:
        """Back to the product: past pointwise operations, else past any, else to one with learned queries."""
        facts, scores = self.facts, self.anchor.inputs[0]
        misses: list[Miss] = []
        for carries in (facts.carries, facts.widely, facts.asked):
            if misses and scores not in carries:
                continue
            try:
                self._read_scores_through(coords, carries, learned=carries is facts.asked)
            except Miss as miss:
                if miss.step != "scores":
                    raise
                misses.append(miss)
            else:
                return
        raise misses[-1 if scores in facts.asked else 0]

    def _read_scores_through(self, coords: Coords, carries: set[Value], learned: bool) -> None:
        passes = (lambda v: v in carries and v.kind != "contraction") if learned else carries.__contains__
        self.scores_reader = Reader(self.space, passes, self.facts.cost)
        self.scores_reader.read(self.anchor.inputs[0], coords)
        self.coords = self.space.resolve_all(coords)
        self._find_product(learned)

    def _summed(self, operands: tuple[tuple[Value, Coords], tuple[Value, Coords]]) -> set[object]:
        kept = self.space.atoms_of(self.out)
        both = [self.space.atoms_of(at) for _, at in operands]
        return (both[0] & both[1]) - kept  # type: ignore[return-value]

    def _find_product(self, learned: bool) -> None:
        """The leaf that is q.k: a product of two computed tensors, one with the key axis and one without.

        learned: also one whose queries are a parameter as it is, the same for every input.
        """
        candidates: list[tuple[Leaf, int, tuple[tuple[Value, Coords], tuple[Value, Coords]]]] = []
        reason = "the scores are not a product of two computed tensors"
        for leaf in list(self.scores_reader.leaves):
            if leaf.value.kind != "contraction" or (
                leaf.value.attrs["mixing"] and not (learned and may_ask(leaf.value))
            ):
                continue
            operands = contraction_inputs(self.space, leaf.value, leaf.coords)
            keys = set(self.space.resolve(self.coords[self.dim]).digits)
            have = [keys & self.space.atoms_of(at) for _, at in operands]
            sides = [found == keys for found in have]
            if sides.count(True) != 1 or all(have):
                reason = "the softmax axis does not come from one operand of the product alone"
                continue
            if self._mixed(operands):
                reason = "a layer mixes the rows of an earlier product before the softmax"
                continue
            key = sides.index(True)
            if operands[key][0] not in self.facts.computed:
                reason = not_tokens(operands[key][0], "keys")
                continue
            if leaf.value.attrs["mixing"] and kind_of_axis(self.space, *operands[key], keys) == "channel":
                reason = "learned queries are compared with features that a layer computed, not with tokens"
                continue
            candidates.append((leaf, key, operands))
        if not candidates:
            raise Miss("scores", self.anchor, reason)
        if self.value[0] not in self.facts.computed:
            raise Miss("values", self.product, not_tokens(self.value[0], "values"))
        # relative positions are multiplied with the queries too: with real keys at hand they are a bias
        candidates = [c for c in candidates if c[2][c[1]][0] in self.facts.activation] or candidates
        # of several products that are added up one is computed in the kernel, and the others are biases
        self.leaf_of_product, key, operands = max(candidates, key=lambda c: _summed_sizes(c[0].value))
        self.query, self.key = operands[1 - key], operands[key]
        labels = [self.leaf_of_product.value.attrs[name] for name in ("lhs", "rhs")]
        out = (None, *self.leaf_of_product.value.attrs["out"])  # None: a size-1 dimension that is broadcast
        summed = [x for x in labels[0] if x in labels[1] and x not in out]
        digits = (a for label in summed for a in operands[0][1][labels[0].index(label)].digits)
        self.features = Coord(tuple(digits)) if summed else None

    def _mixed(self, operands: tuple[tuple[Value, Coords], tuple[Value, Coords]]) -> bool:
        """Whether an axis that one operand alone has is no axis of the softmax any more.

        Mixing heads (an axis of both) leaves queries and keys what they are; a linear layer over the product's last
        axis, as between two blocks of a model, does not.
        """
        own = self.space.atoms_of(self.coords)
        left, right = (self.space.atoms_of(at) for _, at in operands)
        free = (a for a in left ^ right if a.fixed is None and self.space.root_of(a).derived is None)
        return any(a not in own for a in free)

    # ---- outcomes --------------------------------------------------------------------------------------------------

    def fused(self) -> AttentionSite:
        """The site with everything in one kernel.  Raises Miss when the region cannot be fused."""
        passed = [*self.weights_reader.passed, *self.scores_reader.passed]
        if passed:
            raise Miss("weights", passed[0], _between(passed[0]))
        if self.places > 1:
            raise Miss("weights", self.product, "the attention weights are read at several places at once")
        if any(leaf.value.kind == "softmax" for leaf in self.weights_reader.leaves if leaf is not self.leaf):
            raise Miss("weights", self.product, "several softmaxes are combined into one map")
        if not self.space.covers(self.coords[self.dim], self.anchor.shape[self.dim]):
            raise Miss("values", self.product, "the product with the values leaves out a part of the softmax axis")
        if self.features is None:
            raise Miss("axes", self.anchor, "queries and keys are multiplied without a sum over features")
        if self.scores_reader.dropouts:
            raise Miss("scores", self.anchor, "dropout is applied to the scores before the softmax")
        scores = self._write_programs()
        reading = Reading(
            self.space, self.anchor,
            tuple(c for d, c in enumerate(self.coords) if d != self.dim), self.coords[self.dim],
            self.query, self.key, self.value, self.features, self.out,
            self.leaf_of_product.value.dtype, self.product.dtype,
            scores, *self._weights(),
        )  # fmt: skip
        assembled = assemble(reading, self.facts)
        dropouts = self.weights_reader.dropouts
        if len(dropouts) > 1:
            raise Miss("weights", self.product, "dropout is applied to the weights twice")
        interior = self._interior(assembled)
        node = self.product.node
        if self.product.holder is not node:
            raise Miss("closed", self.product, "the product with the values is one part of a larger operation")
        return describe_fused(
            self.anchor, node, assembled, self.out, self.space, interior,
            float(dropouts[0].attrs["p"]) if dropouts else 0.0,
            str(dropouts[0].attrs["module"]) if dropouts else "",
        )  # fmt: skip

    def _write_programs(self) -> sympy.Expr:
        """Reads scores and weights again, now that the product is known: the scores as a program of `s`."""
        product = self.leaf_of_product.value
        made = _made_of(product, self.anchor)
        real = accumulation(product.dtype)
        reader = Reader(
            self.space, made.__contains__, self.facts.cost, stops=frozenset({product}), real=real
        )  # fmt: skip
        scores = without_row_constants(reader.read(self.anchor.inputs[0], self.coords), reader, self.coords[self.dim])
        at = [leaf for leaf in reader.leaves if leaf.value is product and leaf.symbol in scores.free_symbols]
        if len(at) != 1:
            raise Miss("scores", self.anchor, "the scores are read at several places at once")
        if (wide := needs_float64(product, made & reader.visited)) is not None:
            raise Miss("scores", wide, WIDE.format(wide.node.name, product.dtype))
        self.scores_reader, self.leaf_of_product = reader, at[0]
        after = _descendants(self.anchor, stop=self.product)
        reader = Reader(
            self.space, after.__contains__, self.facts.cost, stops=frozenset({self.anchor}), real=real
        )  # fmt: skip
        self.weights = reader.read(*self.weights_at)
        self.weights_reader = reader
        self.leaf = next(leaf for leaf in reader.leaves if leaf.value is self.anchor)
        return scores.xreplace({at[0].symbol: language.s})

    def _weights(self) -> tuple[sympy.Expr, tuple[Leaf, ...], dict[sympy.Symbol, Coord]]:
        """Weight expression with its leaves renamed apart from the score expression's."""
        renamed = {leaf.symbol: sympy.Symbol(f"W{n}") for n, leaf in enumerate(self.weights_reader.leaves)}
        positions = {
            symbol: sympy.Symbol(f"Y{n}", integer=True) for n, symbol in enumerate(self.weights_reader.positions)
        }
        weights = self.weights.xreplace({**renamed, **positions, self.leaf.symbol: language.p})
        leaves = [Leaf(x.value, x.coords, renamed[x.symbol]) for x in self.weights_reader.leaves if x is not self.leaf]
        leaves += [x for x in self.scores_reader.leaves if x is not self.leaf_of_product]
        at = {positions[symbol]: coord for symbol, coord in self.weights_reader.positions.items()}
        return weights, tuple(leaves), {**at, **self.scores_reader.positions}

    def _interior(self, assembled: Assembled) -> frozenset[Value]:
        """What lies between the products; proved closed (nobody outside reads it) and fully read."""
        leaves = [assembled.q.value, assembled.k.value, assembled.v.value, *(x.value for x in assembled.captured)]
        interior = closed_interior(
            self.graph, self.leaf_of_product.value, self.product,
            self.weights_reader.visited | self.scores_reader.visited | {self.anchor, self.leaf_of_product.value},
            leaves, self.beside,
        )  # fmt: skip
        if (source := unfed(self.graph, self.facts, self.product, leaves)) is not None:
            raise Miss("closed", self.product, UNFED.format(source.node.name))
        return interior

    def kept(self, miss: Miss) -> AttentionSite | None:
        """The site as `topk_softmax`: the map stays, the selection and the softmax become one row kernel."""
        scores = self.anchor.inputs[0]
        if self.anchor.holder is None or not can_be_read(scores):
            return None
        if any(x.expired is not None and x.expired <= self.anchor.index for x in held(scores)):
            return None  # the exponential was written over what it is taken of
        keys = tuple(self.space.resolve(self.coords[self.dim]).digits)
        in_query, in_key = (self.space.atoms_of(at) for _, at in (self.query, self.key))
        queries = (in_query - in_key) & self.space.atoms_of(self.coords)
        kind = kind_of_attention(self.space, self.query, self.key, self.value, queries, keys)
        came = keys_from(self.space, (self.key, self.value), keys)
        plan = ScoresKept(
            self.anchor.node, self.anchor.inputs[0], self.dim, self.anchor.expired is not None,
            self.anchor.attrs.get("selection", frozenset()),
        )  # fmt: skip
        width = self.space.size(self.features) if self.features is not None else self.key[0].shape[-1]
        return describe_kept(self.anchor, plan, (*kind, came), width, self.value[0].shape[-1], miss)


def _summed_sizes(product: Value) -> int:
    """How many numbers a product adds up for each of its elements; 0 where that is known only at run time."""
    sizes = dict(zip(product.attrs["lhs"], product.inputs[0].shape, strict=True))
    summed = [size for label, size in sizes.items() if label not in (None, *product.attrs["out"])]
    return math.prod(size if isinstance(size, int) else 0 for size in summed)


def _between(value: Value) -> str:
    if value.kind == "border":
        return f"grad mode is switched off between the two products, after {value.node.name}"
    return f"{value.name} between the two products is not pointwise"


def _made_of(product: Value, anchor: Value) -> set[Value]:
    """What is computed of a product element by element, before the softmax."""
    made: set[Value] = set()
    queue = [product]
    while queue:
        for user in queue.pop().users:
            if user not in made and user.kind in ("pointwise", "layout", "select_by") and user.index < anchor.index:
                made.add(user)
                queue.append(user)
    return made


def _descendants(anchor: Value, stop: Value) -> set[Value]:
    seen: set[Value] = set()
    queue = [anchor]
    while queue:
        for user in queue.pop().users:
            if user not in seen and user.index < stop.index:
                seen.add(user)
                queue.append(user)
    return seen
