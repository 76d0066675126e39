"""What a weight expression makes of a row whose softmax is NaN: one with NaN among its scores, or +inf as the largest.

    p, 0.5*p*c0[h]   ->  NaN                    where(ne(p, p), 0.0, p), where(gt(p, 0.1), p, 0.0)   ->  0

All p of such a row are NaN, so one answer holds for the row, and kernels need no p of it: they write the answer.
"""

from __future__ import annotations

from typing import Literal

import sympy

from kvt_compile.kernels.language import score as language

_COMPARISONS = (language.lt, language.le, language.gt, language.ge, language.eq)


def zero_for_nan(weight: sympy.Expr) -> bool:
    """Whether the weights of such a row are certainly 0."""
    return _of_nan(weight) == "zero"


def of_numbers(weight: sympy.Expr) -> sympy.Expr:
    """The weight expression of a p that is a number: without its own question whether p is one."""
    if not weight.has(language.p):
        return weight
    if isinstance(weight, language.where) and weight.args[0] == language.ne(language.p, language.p):
        return of_numbers(weight.args[2])
    return weight.func(*map(of_numbers, weight.args)) if weight.args else weight


Made = Literal["nan", "zero", "true", "false", "unknown"]
_NOT: dict[Made, Made] = {"true": "false", "false": "true"}


def _of_nan(x: sympy.Expr) -> Made:
    if x == language.p:
        return "nan"
    if not x.has(language.p):
        return "zero" if x == language.zero else "unknown"
    parts = [_of_nan(y) for y in x.args]
    if isinstance(x, language.where):
        return parts[1] if parts[0] == "true" else parts[2] if parts[0] == "false" else "unknown"
    if isinstance(x, language.logical_not):
        return _NOT.get(parts[0], "unknown")
    if isinstance(x, language.logical_and | language.logical_or):
        decides: Made = "true" if isinstance(x, language.logical_or) else "false"
        return decides if decides in parts else "unknown" if "unknown" in parts else _NOT[decides]
    if "nan" in parts:
        return "true" if isinstance(x, language.ne) else "false" if isinstance(x, _COMPARISONS) else "nan"
    vanishes = (isinstance(x, language.Mul) and "zero" in parts) or (isinstance(x, language.Div) and parts[0] == "zero")
    return "zero" if vanishes else "unknown"
