"""Reading: a Value at given coordinates -> a sympy expression over leaves.

    read(softmax input, [b, h, i, j])  ->  0.125*L0 + L1        L0 = the product q.k at [b, h, i, j]
                                                                L1 = bias table at [h, i, j]

A first reading looks for the product; a second one, which knows it, writes the program: what is made of the product is
followed operation by operation, and of captured tensors alone only what a kernel repeats exactly (`exact.py`).

The reader walks backwards through pointwise and layout operations.  It goes through whatever carries the scores, and
through everything else only as far as that makes what must be kept smaller (a mask built by broadcasting two short
vectors is read as the two vectors).  Operations that are not pointwise are passed with their inputs remembered, so that
"this is attention, but with a convolution on the map" can be told from "this is not attention".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch

from kvt_compile.kernels.language import score
from kvt_compile.kernels.language.types import Types
from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import number
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Value, as_dim, at_most, broadcasts, is_number
from kvt_compile.passes.reading.exact import is_exact, meeting, number_in, written
from kvt_compile.passes.reading.passing import passed_inputs

OPAQUE = sympy.Function("opaque")
DROP = sympy.Symbol("drop")
"""The dropout factor of a weight: 0 or 1/(1-p)."""


MOST_PASSED = 64
"""Operations that are not pointwise between a product and its softmax; beyond, it is not that softmax's product."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """An element the expression needs: a value at coordinates."""

    value: Value
    coords: Coords
    symbol: sympy.Symbol


@dataclass
class Reader:
    """One reading.  `carries` says which values the walk must go through; `cost` what keeping a value takes."""

    space: Space
    carries: Callable[[Value], bool]
    cost: dict[Value, float]
    stops: frozenset[Value] = frozenset()
    real: str = ""
    """The accumulation type, where the reading is the program: `carries` then says what is made of the scores."""
    leaves: list[Leaf] = field(default_factory=list)
    positions: dict[sympy.Symbol, Coord] = field(default_factory=dict)
    """Symbols that stand for the value of a coordinate itself."""
    visited: set[Value] = field(default_factory=set)
    passed: list[Value] = field(default_factory=list)
    """Operations on the way that are not pointwise."""
    dropouts: list[Value] = field(default_factory=list)
    _memo: dict[tuple[Value, Coords], sympy.Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._types = Types(self.real, self._dtype)

    def _dtype(self, symbol: sympy.Expr) -> str | None:
        leaf = next((leaf for leaf in self.leaves if leaf.symbol == symbol), None)
        return None if leaf is None else str(leaf.value.dtype).removeprefix("torch.")

    def read(self, value: Value, coords: Coords) -> sympy.Expr:
        """The expression of the element of `value` at `coords`."""
        coords = self.space.resolve_all(coords)
        key = (value, coords)
        if key not in self._memo:
            self._memo[key] = self._read(value, coords)
        return self._memo[key]

    def readers_of(self, symbol: sympy.Symbol) -> list[tuple[Value, list[tuple[Value, Coords, sympy.Expr]]]]:
        """The pointwise values that were read through and have an element, or minus it, among their operands, and how
        those were read."""
        known = {(value, self.space.resolve_all(at)): x for (value, at), x in self._memo.items()}
        found = []
        for (value, at), x in known.items():
            if value.kind != "pointwise" or symbol not in x.free_symbols:
                continue
            places = [(y, self.space.resolve_all(aligned(at, y))) for y in value.operands]
            operands = [(y, place, known[y, place]) for y, place in places if (y, place) in known]
            if any(y in (symbol, score.neg(symbol)) for _, _, y in operands):
                found.append((value, operands))
        return found

    def _read(self, value: Value, coords: Coords) -> sympy.Expr:
        if value in self.stops:
            return self._leaf(value, coords)
        carries = self.carries(value)
        if value.kind == "layout":
            pulled = PULL[value.name](self.space, value, coords)
            if pulled is not None:
                self.visited.add(value)
                return self.read(value.inputs[0], pulled)
        elif carries and value.kind == "select_by":
            return self._chosen(value, coords)
        elif value.kind == "pointwise" and (carries or is_number(value) or self._is_worth_it(value)):
            return self._pointwise(value, coords)
        elif carries and (value.kind != "contraction" or value.attrs["mixing"]) and len(self.passed) < MOST_PASSED:
            return self._pass(value, coords)
        return self._leaf(value, coords)

    def _is_worth_it(self, value: Value) -> bool:
        return self.cost[value] < numel(value) and (not self.real or is_exact(value))

    def _leaf(self, value: Value, coords: Coords) -> sympy.Symbol:
        for leaf in self.leaves:
            if leaf.value is value and self.space.resolve_all(leaf.coords) == coords:
                return leaf.symbol
        taken = {leaf.symbol for leaf in self.leaves}  # a reading goes on with some of another's leaves
        names = (sympy.Symbol(f"L{n}") for n in range(len(self.leaves), 2 * len(self.leaves) + 1))
        leaf = Leaf(value, coords, next(symbol for symbol in names if symbol not in taken))
        self.leaves.append(leaf)
        return leaf.symbol

    def _pointwise(self, value: Value, coords: Coords) -> sympy.Expr:
        if not all(broadcasts(x.shape, value.shape) for x in value.operands):
            return self._leaf(value, coords)  # where an operand is read depends on a size that is known at run time
        self.visited.add(value)
        if self.real and not self.carries(value) and not is_number(value):
            return self._repeated(value, coords)
        arguments = [
            self.read(x, aligned(coords, x)) if isinstance(x, Value) else number(x) for x in value.inputs
        ]  # fmt: skip
        if value.name == "dropout":
            self.dropouts.append(value)
            return score.mul(arguments[0], DROP)
        return scaled(value.attrs["fn"](*arguments))

    def _repeated(self, value: Value, coords: Coords) -> sympy.Expr:
        """A value of captured tensors alone, as torch computes it; a leaf where that cannot be said."""
        met = meeting(value)
        arguments = [
            self.read(x, aligned(coords, x)) if isinstance(x, Value) else number_in(x, met) for x in value.inputs
        ]  # fmt: skip
        expression = written(value, arguments, self._types)
        return self._leaf(value, coords) if expression is None else expression

    def _pass(self, value: Value, coords: Coords) -> sympy.Expr:
        inputs = passed_inputs(self.space, value, coords)
        if inputs is None:
            return self._leaf(value, coords)
        self.visited.add(value)
        self.passed.append(value)
        return OPAQUE(sympy.Integer(value.index), *(self.read(x, at) for x, at in inputs))

    def _chosen(self, value: Value, coords: Coords) -> sympy.Expr:
        """put(base, inner, start, size and step of dim): the inner value where the slice is, the base elsewhere.
        cat(parts): every part where it lies."""
        if value.name == "cat":
            return self._parts(value, coords)
        base, inner = value.inputs
        dim, start, size, step = (value.attrs.get(name, 1) for name in ("dim", "start", "size", "step"))
        self.visited.add(value)
        whole = value.shape[dim]
        known = self.space.known(coords[dim])
        if known is not None and isinstance(size, int):
            place, between = divmod(known - start, step)
            if 0 <= place < size and not between:
                inside = (*coords[:dim], self.space.constant(size, place), *coords[dim + 1 :])
                return self.read(inner, aligned(inside, inner)) if isinstance(inner, Value) else number(inner)
            return self.read(base, coords)
        at = self.position(coords[dim])
        conditions = [] if start == 0 else [score.ge(at, sympy.Integer(start))]
        if not (isinstance(whole, int) and isinstance(size, int) and start + size * step >= whole):
            conditions.append(score.lt(at, sympy.sympify(start + size * step)))
        if step > 1:
            conditions.append(score.eq(score.mod(at - start, sympy.Integer(step)), sympy.Integer(0)))
        inside = (*coords[:dim], self.space.inside(coords[dim], start, size, step), *coords[dim + 1 :])
        before = self._memo
        if size == 1 and conditions:  # x[:, 0] += y: where it is written, x at 0 is x at the coordinate
            elsewhere = self.read(base, coords)
            constants = (Coord((), start), self.space.constant(whole, start))
            places = ((*coords[:dim], constant, *coords[dim + 1 :]) for constant in constants)
            same = {(base, self.space.resolve_all(place)): elsewhere for place in places}
            self._memo = {**before, **same}
        written = self.read(inner, aligned(inside, inner)) if isinstance(inner, Value) else number(inner)
        self._memo = before  # what was read under the condition holds under it alone
        if not conditions:
            return written
        condition = conditions[0]
        for more in conditions[1:]:
            condition = score.logical_and(condition, more)
        return score.where(condition, written, self.read(base, coords))

    def _parts(self, value: Value, coords: Coords) -> sympy.Expr:
        dim = value.attrs["dim"]
        self.visited.add(value)
        expression: sympy.Expr | None = None
        stop = value.shape[dim]
        coord = self.space.resolve(coords[dim])
        known = self.space.known(coord)
        end = as_dim(coord.start + self.space.size(coord)) if coord.step == 1 else None
        for part in reversed(value.inputs):
            start = as_dim(stop - part.shape[dim])
            if known is not None and isinstance(start, int) and isinstance(stop, int):
                if start <= known < stop:
                    constant = self.space.constant(part.shape[dim], known - start)
                    return self.read(part, (*coords[:dim], constant, *coords[dim + 1 :]))
                stop = start
                continue
            if end is not None and at_most(end, start):
                stop = start  # the coordinate never gets that far
                continue
            if end is not None and isinstance(start, int) and start <= coord.start and at_most(end, stop):
                moved = Coord(coord.digits, coord.start - start)  # it never leaves this part
                return self.read(part, (*coords[:dim], moved, *coords[dim + 1 :]))
            inside = (*coords[:dim], self.space.inside(coord, start, part.shape[dim]), *coords[dim + 1 :])
            here = self.read(part, aligned(inside, part))
            if expression is None:
                expression = here
            else:
                expression = score.where(score.lt(self.position(coord), sympy.sympify(stop)), here, expression)
            stop = start
        assert expression is not None
        return expression

    def position(self, coord: Coord) -> sympy.Symbol:
        for symbol, known in self.positions.items():
            if self.space.resolve(known) == self.space.resolve(coord):
                return symbol
        symbol = sympy.Symbol(f"X{len(self.positions)}", integer=True)
        self.positions[symbol] = coord
        return symbol


def accumulation(dtype: torch.dtype | None) -> str:
    """The type that scores of this dtype are computed in."""
    return "float64" if dtype is torch.float64 else "float32"


def scaled(x: sympy.Expr) -> sympy.Expr:
    """Scores by a number: division as a product with the reciprocal, as torch does it on a GPU, and two factors as one
    where that is exact.

    s / 8.0  ->  0.125*s        2.0*(0.125*s)  ->  0.25*s
    """
    if isinstance(x, score.Div) and isinstance(x.args[1], sympy.Float) and _SMALLEST < abs(x.args[1]) < 1 / _SMALLEST:
        return scaled(score.mul(sympy.Float(1.0 / float(x.args[1])), x.args[0]))
    if isinstance(x, score.Mul) and isinstance(x.args[0], sympy.Float) and isinstance(x.args[1], score.Mul):
        first, inner = float(x.args[0]), x.args[1].args[0]
        if isinstance(inner, sympy.Float) and any(abs(math.frexp(y)[0]) == 0.5 for y in (first, float(inner))):
            product = first * float(inner)
            if all(_SMALLEST < abs(y) < 1 / _SMALLEST for y in (first, float(inner), product)):
                kept = x.args[1].args[1]
                return kept if product == 1.0 else score.mul(sympy.Float(product), kept)
    return x


_SMALLEST = 2.0**-100
"""Numbers, reciprocals and products between this and its inverse are normal in every accumulation type, and so is what
is left of usual scores."""


def aligned(coords: Coords, x: Value) -> Coords:
    """Coordinates of an operand under right-aligned broadcasting."""
    tail = coords[len(coords) - len(x.shape) :]
    return tuple(ZERO if size == 1 else coord for size, coord in zip(x.shape, tail, strict=True))


SYMBOLIC_SIZE = 64.0
"""What a dynamic size counts as when two costs are compared."""


def numel(value: Value) -> float:
    total = 1.0
    for size in value.shape:
        total *= size if isinstance(size, int) else SYMBOLIC_SIZE
    return total
