"""Score expression -> which keys a row may keep, as far as the expression proves it:

    where(le(j, i + 2), s, -oo)   ->   j <= i + 2: keys up to last_row + 2, and rows from first_key - 2

A key outside is -inf whatever s is, so its tile need not be computed: t is -inf, never NaN, and the key is never kept.
Only conditions of a where() whose other branch is -oo count: a mask that is added lets a NaN of s through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import sympy

from kvt_compile.kernels.language import score as language

Bound = tuple[Literal["first", "last"], sympy.Expr]
"""The first or last index that is not ruled out; symbols `low` and `high` are the ends of the other axis' tile."""

low, high = sympy.symbols("low high", integer=True)
_OPPOSITE = {language.lt: language.ge, language.le: language.gt, language.gt: language.le, language.ge: language.lt}


def key_bounds(score: sympy.Expr) -> tuple[Bound, ...]:
    """Bounds of j for a tile of rows `low` .. `high`."""
    return _bounds(score, language.j, language.i)


def row_bounds(score: sympy.Expr) -> tuple[Bound, ...]:
    """Bounds of i for a tile of keys `low` .. `high`."""
    return _bounds(score, language.i, language.j)


def _bounds(score: sympy.Expr, axis: sympy.Symbol, other: sympy.Symbol) -> tuple[Bound, ...]:
    found = (_solve(excess, axis, other) for excess in _required(score))
    return tuple(dict.fromkeys(bound for bound in found if bound is not None))


def _required(score: sympy.Expr) -> Iterator[sympy.Expr]:
    """Expressions x with x <= 0 wherever the score is not -oo."""
    if not isinstance(score, language.where):
        return
    condition, yes, no = score.args
    if no == -sympy.oo:
        yield from _holds(condition, True)
        yield from _required(yes)
    elif yes == -sympy.oo:
        yield from _holds(condition, False)
        yield from _required(no)


def _holds(condition: sympy.Expr, truth: bool) -> Iterator[sympy.Expr]:
    """x <= 0 for comparisons of integers that follow from the condition having that truth value."""
    if isinstance(condition, language.logical_not):
        yield from _holds(condition.args[0], not truth)
    elif isinstance(condition, language.logical_and if truth else language.logical_or):
        for part in condition.args:
            yield from _holds(part, truth)
    elif isinstance(condition, language.eq) and truth:
        x, y = condition.args
        if language.is_index(x) and language.is_index(y):
            yield from (x - y, y - x)
    elif type(condition) in _OPPOSITE and all(map(language.is_index, condition.args)):
        kind = type(condition) if truth else _OPPOSITE[type(condition)]
        x, y = condition.args
        difference = x - y if kind in (language.lt, language.le) else y - x
        yield difference + 1 if kind in (language.lt, language.gt) else difference


def _solve(excess: sympy.Expr, axis: sympy.Symbol, other: sympy.Symbol) -> Bound | None:
    """The bound of `axis` where +-axis + c * other + rest <= 0; None where the expression is nothing so simple."""
    sizes = {x for x in excess.free_symbols if str(x)[0] == "n"}
    if not excess.free_symbols <= {axis, other, *sizes} or excess.atoms(sympy.Function, sympy.Float, sympy.Rational) - {
        x for x in excess.atoms(sympy.Rational) if x.is_Integer
    }:
        return None
    excess = sympy.expand(excess)
    if not excess.is_polynomial(axis, other) or sympy.Poly(excess, axis, other).total_degree() > 1:
        return None
    sign, slope = excess.coeff(axis), excess.coeff(other)
    if sign not in (1, -1) or not slope.is_Integer:
        return None
    rest = sympy.expand(excess - sign * axis - slope * other)
    if sign == 1:  # axis <= -slope * other - rest: as large as it gets in the tile
        return "last", -slope * (high if slope < 0 else low) - rest
    return "first", slope * (low if slope > 0 else high) + rest
