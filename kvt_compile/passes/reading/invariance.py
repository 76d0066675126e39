"""softmax(t + c) = softmax(t) for any c that is the same along the row; so is which keys are the k largest.

    alpha * (x - max(x))   ->   alpha * x        x - logsumexp(x)   ->   x

Models subtract a row maximum (or the maximum of everything) for numerical safety, which the kernel does by itself, and
logarithms of softmaxes have a sum of the row subtracted.  No gradient comes through such a number.

In floating point only where c is no larger than the scores that count: a row masked with -1e30 has a mean of -1e29, and
what that is subtracted from are scores no more.
"""

from __future__ import annotations

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative
from kvt_compile.passes.canonical.coords import Coord
from kvt_compile.passes.canonical.values import Value, is_number
from kvt_compile.passes.reading.read import Reader


def without_row_constants(scores: sympy.Expr, reader: Reader, keys: Coord) -> sympy.Expr:
    """The scores without what is taken of the scores themselves along a row and enters them as one added number."""
    space = reader.space
    along = set(space.resolve(keys).digits)
    varying = {
        leaf.symbol for leaf in reader.leaves if any(along & set(c.digits) for c in space.resolve_all(leaf.coords))
    }
    varying |= {symbol for symbol, at in reader.positions.items() if along & set(space.resolve(at).digits)}
    for leaf in reader.leaves:
        maximum = _detached(leaf.value)
        if maximum[-1].kind != "reduce" or leaf.symbol in varying:
            continue
        of = _detached(maximum[-1].inputs[0])[-1]
        if not (reader.carries(of) or of in reader.stops) or not is_of_the_scores_size(maximum[-1]):
            continue  # of something else: it need not be of the size of the scores, which rounds them
        slope = derivative(scores, leaf.symbol)
        if slope == language.zero or slope.free_symbols & (varying | {leaf.symbol}):
            continue
        scores = _without(scores, leaf.symbol)
        reader.visited.update(maximum)
    return scores


def is_of_the_scores_size(reduction: Value) -> bool:
    """Whether what a row is reduced to, taken from its scores, leaves them what they are.

    The largest score, and the logarithm of the sum, are of the size of the scores that count.  The smallest and the
    mean are so for bare scores, a product times numbers; a mask or a bias makes them of any size, and a sum grows.
    """
    if reduction.name in ("amax", "logsumexp"):
        return True
    return reduction.name in ("amin", "mean") and _is_bare(reduction.inputs[0])


def _is_bare(value: Value) -> bool:
    while value.kind != "contraction":
        scaled = value.kind == "pointwise" and value.name in ("mul", "div", "neg", "identity")
        inputs = [x for x in value.inputs if isinstance(x, Value) and not is_number(x)]
        if len(inputs) != 1 or not (scaled or value.kind in ("layout", "border") or value.name == "detach"):
            return False
        if value.name == "div" and inputs[0] is not value.inputs[0]:
            return False
        value = inputs[0]
    return True


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


def _detached(value: Value) -> list[Value]:
    """The value and what it is, detached."""
    chain = [value]
    while chain[-1].name in ("detach", "identity") and chain[-1].inputs:
        chain.append(chain[-1].inputs[0])
    if chain[-1].kind == "reduce" and chain[-1].inputs[0].kind == "border":
        chain.insert(0, chain[-1].inputs[0])  # a maximum that was taken without grad
    return chain
