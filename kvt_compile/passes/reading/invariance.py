"""softmax(t + c) = softmax(t) for any c that is the same along the row; so is which keys are the k largest.

    alpha * (x - max(x))   ->   alpha * x        x - logsumexp(x)   ->   x

Models subtract a row maximum (or the maximum of everything) for numerical safety, which the kernel does by itself, and
logarithms of softmaxes have a sum of the row subtracted.  No gradient comes through such a number.

Only where it enters the scores in no other way, and where floats do not forget the scores for it (`shifts.py`).
"""

from __future__ import annotations

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.coords import Coord
from kvt_compile.passes.canonical.shifts import is_own
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.reading.read import Leaf, Reader


def without_row_constants(scores: sympy.Expr, reader: Reader, keys: Coord) -> sympy.Expr:
    """The scores without what is taken of the scores themselves along a row and enters them as one added number."""
    space = reader.space
    along = set(space.resolve(keys).digits)
    varying = {
        leaf.symbol for leaf in reader.leaves if any(along & set(c.digits) for c in space.resolve_all(leaf.coords))
    }
    varying |= {symbol for symbol, at in reader.positions.items() if along & set(space.resolve(at).digits)}
    for leaf in reader.leaves:
        if leaf.symbol in varying or leaf.symbol not in scores.free_symbols:
            continue
        way = _way_to(leaf.value)
        factors = _factors(scores, leaf.symbol) if any(x.kind == "reduce" for x in way) else None
        if factors is None or factors & varying or not _is_own_everywhere(reader, leaf, keys):
            continue
        scores = _without(scores, leaf.symbol)
        reader.visited.update(way)
    return scores


def _factors(x: sympy.Expr, symbol: sympy.Symbol) -> set[sympy.Symbol] | None:
    """The symbols that a symbol is multiplied with on its ways into an expression; None where it enters as anything but
    a term: u + 2*(u > -1) has another value for another u."""
    if x == symbol or symbol not in x.free_symbols:
        return set()
    inner = [y for y in x.args if symbol in y.free_symbols]
    name = type(x).__name__
    if name in ("mul", "div") and (len(inner) == 2 or (name == "div" and inner[0] is not x.args[0])):
        return None
    if name not in ("add", "sub", "neg", "mul", "div", "float32", "float64"):
        return None
    found = {other for y in x.args if y not in inner for other in y.free_symbols} if name in ("mul", "div") else set()
    for y in inner:
        more = _factors(y, symbol)
        if more is None:
            return None
        found |= more
    return found


def _is_own_everywhere(reader: Reader, leaf: Leaf, keys: Coord) -> bool:
    """Whether everything that reads an element takes it from what it is the row's own number of."""
    kept = []
    for value, operands in reader.readers_of(leaf.symbol):
        if value.name in ("identity", "neg"):
            continue  # its readers are asked
        term = language.neg(leaf.symbol) if value.name == "add" else leaf.symbol
        places = [n for n, (_, _, x) in enumerate(operands) if x == term]
        if value.name not in ("add", "sub") or len(operands) != 2 or len(places) != 1:
            return False
        if value.name == "sub" and places == [0]:
            return False
        kept.append(operands[1 - places[0]][:2])
    return bool(kept) and all(is_own(reader.space, keys, (leaf.value, leaf.coords), x) for x in kept)


def _without(x: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """The expression with 0 in the place of a symbol that is added to it or taken from it."""
    if x == symbol:
        return language.zero
    if symbol not in x.free_symbols:
        return x
    args = [_without(y, symbol) for y in x.args]
    nothing = [y == language.zero and y is not old for y, old in zip(args, x.args, strict=True)]
    match type(x).__name__, nothing:
        case ("add" | "sub", [False, True]):
            return args[0]
        case "add", [True, False]:
            return args[1]
        case "sub", [True, False]:
            return language.neg(args[1])
        case (("mul" | "div" | "neg"), _) if any(nothing):
            return language.zero
    return x.func(*args)


def _way_to(value: Value) -> list[Value]:
    """A number of a row, and the rearrangements and copies between it and the scores it is taken of."""
    way, reduced = [value], value.kind == "reduce"
    while way[-1].inputs and isinstance(inner := way[-1].inputs[0], Value):
        if inner.kind == "reduce" and not reduced:
            reduced = True
        elif inner.kind not in ("layout", "border") and inner.name not in ("detach", "identity"):
            break
        way.append(inner)
    return way
