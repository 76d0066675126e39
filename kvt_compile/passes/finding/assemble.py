"""Reading -> site: which atoms are batch, heads, queries, keys and features, and what the score expression is.

t = 0.125*L0 + L1,  w = L2*drop        L0 = product [b,h,i,j], L1 = bias [h,i,j], L2 = softmax
  ->  score "0.125*s + c0[h, i, j]", weight "p", dropout, q/k/v with their axes
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.coords import Atom, Axes, Coord, Coords, Space
from kvt_compile.passes.canonical.made import can_be_read
from kvt_compile.passes.canonical.meaning import number as as_number
from kvt_compile.passes.canonical.meaning_layout import PULL, REARRANGES
from kvt_compile.passes.canonical.values import Dim, Value, product, same_shape
from kvt_compile.passes.finding.miss import Miss
from kvt_compile.passes.finding.sizes import size_sources
from kvt_compile.passes.reading.facts import Facts
from kvt_compile.passes.reading.origin import keys_from
from kvt_compile.passes.reading.provenance import kind_of_attention
from kvt_compile.passes.reading.read import DROP, Leaf, Reader, accumulation, aligned, scaled
from kvt_compile.passes.site import Axis, Groups, KeysFrom, Operand


@dataclass(frozen=True)
class Reading:
    """What both anchors (a softmax between two products, an SDPA call) are reduced to."""

    space: Space
    anchor: Value
    rows: Coords
    """Coordinates of the score tensor's dimensions but the softmax axis, in order."""
    keys: Coord
    query: tuple[Value, Coords]
    key: tuple[Value, Coords]
    value: tuple[Value, Coords]
    features: Coord
    out: Coords
    score_dtype: torch.dtype | None
    """Of the product of queries and keys (autocast may have lowered it)."""
    out_dtype: torch.dtype | None
    scores: sympy.Expr
    """Over the leaf symbols, `s` for the product."""
    weights: sympy.Expr
    """Over the leaf symbols, `p` for the softmax, DROP for dropout."""
    leaves: tuple[Leaf, ...]
    positions: dict[sympy.Symbol, Coord]


@dataclass(frozen=True)
class Assembled:
    axis: Axis
    lost_behind: str
    keys_from: KeysFrom | None
    groups: Groups
    q: Operand
    k: Operand
    v: Operand
    score: sympy.Expr
    weight: sympy.Expr
    captured: tuple[Leaf, ...]
    sizes: tuple[tuple[Atom, ...], ...]
    has_dropout: bool
    sources: tuple[Value, ...]
    """q, k and v as the model passed them to the products."""


def assemble(reading: Reading, facts: Facts) -> Assembled:
    """Names the axes and prints the expressions.  Raises Miss when the pieces do not make an attention."""
    space = reading.space
    q_dtype, v_dtype = reading.score_dtype, reading.out_dtype
    if q_dtype is None or v_dtype is None or not q_dtype.is_floating_point or not v_dtype.is_floating_point:
        raise Miss("axes", reading.anchor, "queries, keys or values are not floating-point tensors")
    factors: list[Factor] = []
    peeled: list[tuple[Value, Coords]] = []
    reader = Reader(
        space, lambda v: False, facts.cost, leaves=list(reading.leaves), positions=reading.positions,
        real=accumulation(q_dtype),
    )  # fmt: skip
    for value, coords in (reading.query, reading.key):
        base, at, more = peel(reader, value, coords, scales=True)
        factors += more
        peeled.append((base, at))
    peeled.append(peel(reader, *reading.value, scales=False)[:2])
    (q, q_at), (k, k_at), (v, v_at) = ((x, space.resolve_all(at)) for x, at in peeled)
    groups = _groups(reading, q_at, k_at, v_at)
    kind = kind_of_attention(space, reading.query, reading.key, reading.value, groups.queries, groups.keys)
    scores = with_factors(reading.scores, factors)
    printed = _Printed(space, groups, reader.leaves, reading.positions, reading.anchor)
    weights, has_dropout = _without_dropout(reading.weights, reading.anchor)
    score, weight = printed.expression(scores), printed.expression(weights)
    _check_weight(weight, reading.anchor)
    operands = Operand(q, q_at, q_dtype), Operand(k, k_at, q_dtype), Operand(v, v_at, v_dtype)
    _check_sizes(operands, groups, reading.anchor)
    return Assembled(
        *kind, keys_from(space, (reading.key, reading.value), groups.keys), groups, *operands,
        score, weight, tuple(printed.captured), tuple(printed.sizes), has_dropout,
        (reading.query[0], reading.key[0], reading.value[0]),
    )  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """A number that queries or keys were multiplied with or divided by."""

    value: sympy.Expr
    divides: bool


def with_factors(scores: sympy.Expr, factors: Sequence[Factor]) -> sympy.Expr:
    """The scores with what stood on the queries and keys moved onto s; all numbers become one."""
    number = 1.0
    product: sympy.Expr = language.s
    for factor in factors:
        if isinstance(factor.value, sympy.Float):
            number = number / float(factor.value) if factor.divides else number * float(factor.value)
        else:
            product = (language.div if factor.divides else language.mul)(product, factor.value)
    if number != 1.0:
        product = scaled(language.mul(as_number(number), product))
    return rescaled(scores, product)


def rescaled(scores: sympy.Expr, product: sympy.Expr) -> sympy.Expr:
    """The scores with a product in the place of s."""
    if product == language.s:
        return scores
    known: dict[sympy.Expr, sympy.Expr] = {language.s: product}

    def build(x: sympy.Expr) -> sympy.Expr:
        if language.s not in x.free_symbols:
            return x
        if x not in known:
            known[x] = scaled(x.func(*(build(y) for y in x.args)))
        return known[x]

    return build(scores)


def peel(reader: Reader, value: Value, coords: Coords, *, scales: bool) -> tuple[Value, Coords, tuple[Factor, ...]]:
    """Looks through rearrangements and scale factors to the tensor below: (base, its coordinates, factors)."""
    space = reader.space
    factors: tuple[Factor, ...] = ()
    best = (value, space.resolve_all(coords), factors)
    while True:
        step = _one_step(reader, value, coords, scales)
        if step is None:
            return best
        value, coords, more = step
        factors += more
        coords = space.resolve_all(coords)
        if all(c.plain for c in coords) and value.holder is not None and value.expired is None:
            best = (value, coords, factors)


def _one_step(
    reader: Reader, value: Value, coords: Coords, scales: bool
) -> tuple[Value, Coords, tuple[Factor, ...]] | None:
    if value.kind == "layout" and value.name in REARRANGES:
        pulled = PULL[value.name](reader.space, value, coords)
        return None if pulled is None else (value.inputs[0], pulled, ())
    if value.kind != "pointwise":
        return None
    if value.name == "identity" and value.inputs[0].dtype == value.dtype:
        return value.inputs[0], coords, ()
    if not scales or value.name not in ("mul", "div"):
        return None
    for position, x in enumerate(value.inputs):
        other = value.inputs[1 - position]
        if not isinstance(x, Value) or x.dtype != value.dtype or (value.name == "div" and position == 1):
            continue
        if not same_shape(x.shape, value.shape):
            continue
        divides = value.name == "div"
        scale = _scale(reader, other, coords)
        if scale is not None and _moves(scale, divides):
            return x, coords, (Factor(scale, divides),)
    return None


def _scale(reader: Reader, other: object, coords: Coords) -> sympy.Expr | None:
    """The factor as an expression when it is one number (a scalar or a one-element tensor), else None."""
    if isinstance(other, int | float) and not isinstance(other, bool):
        return as_number(other)
    if isinstance(other, Value) and all(size == 1 for size in other.shape):
        return reader.read(other, aligned(coords, other))
    return None


def _moves(scale: sympy.Expr, divides: bool) -> bool:
    """Whether a product of scaled numbers is the scaled product: infinities of different signs sum up to NaN, and what
    is scaled to nothing is not there to be scaled back."""
    if not language.is_number(scale):
        return True
    return _TINY < abs(float(scale)) < 1 / _TINY


_TINY = 2.0**-50
"""Queries and keys of any usual size that are both multiplied with a number between this and its inverse are normal
numbers, and so is their product."""


def _atoms(coords: Coords) -> set[Atom]:
    """The counters that run; a constant digit is a matter of reading the operand."""
    return {a for c in coords for a in c.digits if a.fixed is None}


def _groups(reading: Reading, q: Coords, k: Coords, v: Coords) -> Groups:
    space, anchor = reading.space, reading.anchor
    keys = space.resolve(reading.keys).digits
    features = space.resolve(reading.features).digits
    in_q, in_k, in_v = _atoms(q), _atoms(k), _atoms(v)
    rows = [[a for a in space.resolve(c).digits if a.fixed is None] for c in reading.rows]
    if not set(keys) <= in_k or not set(keys) <= in_v or set(keys) & in_q:
        raise Miss("axes", anchor, "the softmax axis is not one axis shared by the keys and the values alone")
    if not set(features) <= in_q or not set(features) <= in_k:
        raise Miss("axes", anchor, "queries and keys are not contracted over one common axis")
    own = [[a for a in dim if a in in_q and a not in in_k and a not in in_v] for dim in rows]
    at = max((n for n, dim in enumerate(own) if dim), default=None)
    queries = tuple(own[at]) if at is not None else ()
    batch = [(n, a) for n, dim in enumerate(rows) for a in dim if a not in queries]
    group: list[Atom] = []
    while batch and batch[-1][1] not in in_k and batch[-1][1] not in in_v:
        group.insert(0, batch.pop()[1])
    dims = sorted({n for n, _ in batch})
    last = dims[-1] if len(dims) > 1 or (dims and dims[0] > 0) else None
    heads = [a for n, a in batch if n == last]
    if last is None and len(batch) > 1:
        heads = [batch[-1][1]]
    rest = [a for _, a in batch if a not in heads]
    everything = {*rest, *heads, *group, *queries}
    value_features = tuple(
        a for c in space.resolve_all(reading.out) for a in c.digits if a in in_v and a not in everything
    )
    stray = (in_q - everything - set(features)) | (in_k - everything - set(features) - set(keys))
    stray |= in_v - everything - set(keys) - set(value_features)
    if stray:
        raise Miss("axes", anchor, "an operand has an axis that is neither batch, head, token nor feature")
    if _atoms(space.resolve_all(reading.out)) - everything - set(value_features):
        raise Miss("axes", anchor, "the result has an axis that neither the weights nor the values have")
    if everything - _atoms(space.resolve_all(reading.out)):
        raise Miss("axes", anchor, "the product with the values sums over more than the keys")
    return Groups(tuple(rest), tuple(heads), tuple(group), queries, keys, features, value_features)


def _check_sizes(operands: tuple[Operand, Operand, Operand], groups: Groups, anchor: Value) -> None:
    """Every size the rewrite will have to write down must be a number or readable from an operand."""
    sources = size_sources(operands)
    digits = [a for x in operands for coord in x.coords for a in coord.digits]
    digits += [a for name in groups.__dataclass_fields__ for a in getattr(groups, name)]
    if any(not isinstance(a.size, int) and a not in sources for a in digits):
        raise Miss("axes", anchor, "an axis has a dynamic size that is no dimension of queries, keys or values")
    for operand in operands:
        for coord in operand.coords:
            if coord.step != 1 and not all(isinstance(a.size, int) for a in coord.digits):
                raise Miss("axes", anchor, "every so many elements are taken of an axis whose size is dynamic")


class _Printed:
    """Leaf symbols -> the score language, numbering captured tensors and dynamic sizes as they come."""

    def __init__(
        self, space: Space, groups: Groups, leaves: list[Leaf], positions: dict[sympy.Symbol, Coord], anchor: Value
    ) -> None:
        axes = {
            "b": groups.batch,
            "h": (*groups.kv_heads, *groups.group),
            "i": groups.queries,
            "j": groups.keys,
        }
        symbols = {"b": language.b, "h": language.h, "i": language.i, "j": language.j}
        self._axes = Axes(space, axes, symbols)
        self._space, self._leaves, self._positions, self._anchor = space, leaves, positions, anchor
        self._atoms = [a for atoms in axes.values() for a in atoms]
        self.captured: list[Leaf] = []
        self.sizes: list[tuple[Atom, ...]] = []
        self._size_names: dict[sympy.Expr, sympy.Symbol] = {}

    def expression(self, expression: sympy.Expr) -> sympy.Expr:
        known = {leaf.symbol: leaf for leaf in self._leaves}
        replaced: dict[sympy.Basic, sympy.Expr] = {}
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol in known:
                replaced[symbol] = self._load(known[symbol])
            elif symbol in self._positions:
                replaced[symbol] = self._index(self._positions[symbol])
        return self._checked(expression.xreplace(replaced))

    def _checked(self, expression: sympy.Expr) -> sympy.Expr:
        """What the kernels will read of its text, which has limits."""
        if expression.has(sympy.nan):
            raise Miss("scores", self._anchor, "NaN is one of the numbers the scores are computed with")
        try:
            if language.parse(language.to_text(expression)) == expression:
                return expression
        except language.ScoreSyntaxError:
            pass
        raise Miss("scores", self._anchor, "what is computed between the two products is too long for one kernel")

    def _load(self, leaf: Leaf) -> sympy.Expr:
        if leaf.value.dtype is None or leaf.value.dtype.is_complex:
            raise Miss("scores", leaf.value, f"{leaf.value.node.name}, which takes part in the scores, is not real")
        if not can_be_read(leaf.value):
            raise Miss("scores", leaf.value, f"an inner part of {leaf.value.node.name} takes part in the scores")
        values = [captured.value for captured in self.captured]
        if leaf.value not in values:
            self.captured.append(leaf)
            values.append(leaf.value)
        return language.load(values.index(leaf.value), *(self._index(c) for c in leaf.coords))

    def _index(self, coord: Coord) -> sympy.Expr:
        if not self._axes.knows(coord):
            raise Miss("scores", self._anchor, "the scores depend on a tensor whose axes cannot be followed")
        return self._with_sizes(self._axes.text(coord))

    def _with_sizes(self, expression: sympy.Expr) -> sympy.Expr:
        """Dynamic sizes (s0, ...) become n0, n1, ...; the rewrite feeds their values."""
        names = {str(x) for x in (language.b, language.h, language.i, language.j)}
        foreign = [x for x in expression.free_symbols if str(x) not in names]
        if not foreign:
            return expression
        for atoms in _runs(self._atoms):
            size = sympy.sympify(product(a.size for a in atoms))
            if size.free_symbols & set(foreign) and expression.has(size):
                if size not in self._size_names:
                    self._size_names[size] = language.size_symbol(len(self.sizes))
                    self.sizes.append(atoms)
                expression = expression.subs(size, self._size_names[size])
        if any(not str(x).startswith("n") and str(x) not in names for x in expression.free_symbols):
            raise Miss("scores", self._anchor, "an index depends on a dynamic size that cannot be named")
        return expression


def _runs(atoms: list[Atom]) -> list[tuple[Atom, ...]]:
    return [tuple(atoms[i:j]) for i in range(len(atoms)) for j in range(i + 1, min(i + 4, len(atoms)) + 1)]


def _without_dropout(weights: sympy.Expr, anchor: Value) -> tuple[sympy.Expr, bool]:
    if DROP not in weights.free_symbols:
        return weights, False
    without = _without_factor(weights, DROP)
    if without is None or DROP in without.free_symbols:
        raise Miss("weights", anchor, "dropout is not one factor of the attention weights")
    return without, True


def _without_factor(x: sympy.Expr, factor: sympy.Symbol) -> sympy.Expr | None:
    """The expression without one of its factors; None where it is not one of the whole."""
    name = type(x).__name__
    if name == "mul" and factor in x.args:
        return x.args[1] if x.args[0] == factor else x.args[0]
    if name in ("mul", "div", "neg"):
        for position, y in enumerate(x.args):
            inner = _without_factor(y, factor) if factor in y.free_symbols and (name, position) != ("div", 1) else None
            if inner is not None:
                return x.func(*x.args[:position], inner, *x.args[position + 1 :])
    return None


def _check_weight(weight: sympy.Expr, anchor: Value) -> None:
    """A key that is not kept must weigh nothing: w(p=0) = 0 for every row."""
    left = _without_weight(weight)
    if left != 0.0:
        may = "may revive" if left is None else "revives"
        raise Miss("weights", anchor, f"the weights are changed after the softmax in a way that {may} dropped keys")


_OF_NUMBERS: dict[str, Callable[..., float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "relu": lambda x: max(x, 0.0), "maximum": max, "minimum": min, "power": operator.pow,
    "clamp": lambda x, low, high: min(max(x, low), high), "hardtanh": lambda x, low, high: min(max(x, low), high),
    "eq": operator.eq, "ne": operator.ne, "exp": math.exp, "tanh": math.tanh, "sin": math.sin, "erf": math.erf,
}  # fmt: skip


def _without_weight(x: sympy.Expr) -> float | None:
    """The value where p is 0; None where it depends on something else."""
    if x == language.p:
        return 0.0
    if language.is_number(x):
        return float(x)
    name, values = type(x).__name__, [_without_weight(y) for y in x.args]
    if (name == "mul" and 0.0 in values) or (name == "div" and values[0] == 0.0):
        return 0.0
    if name == "where":
        if values[0] is not None:
            return values[1] if values[0] else values[2]
        return values[1] if values[1] == values[2] else None
    known = [y for y in values if y is not None]
    if name not in _OF_NUMBERS or len(known) < len(values):
        return None
    try:
        return _OF_NUMBERS[name](*known)
    except (ArithmeticError, ValueError):
        return None


def size_of(atoms: tuple[Atom, ...]) -> Dim:
    return product(a.size for a in atoms)
