"""What every generator of code asks about score expressions: which indices are safe, which divisions agree.

An index that is one coordinate or a constant, outside every where(), is checked once at launch (`op/captured.py`);
every other is clamped at each load.  No index reaches memory otherwise: a text may come from anybody.
"""

from __future__ import annotations

import sympy

from kvt_compile.kernels.language import score as language

COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class NotGenerated(ValueError):  # noqa: N818 - the reason is shown to people as it is
    """The reason why an expression cannot be written in a generator's language."""


def plain_index(index: sympy.Expr) -> bool:
    """True for a constant or one coordinate: what is checked once at launch instead of clamped at every load."""
    if isinstance(index, sympy.Integer):
        return int(index) >= 0
    return index in (language.b, language.h, language.i, language.j)


def guarded_loads(expression: sympy.Expr, inside: bool = False) -> frozenset[language.load]:
    """Loads inside a branch of a where(): their index may leave the tensor while the branch is not taken."""
    found = frozenset({expression}) if inside and isinstance(expression, language.load) else frozenset()
    for position, argument in enumerate(expression.args):
        branch = isinstance(expression, language.where) and position > 0
        found |= guarded_loads(argument, inside or branch)
    return found


def nonnegative(x: sympy.Expr) -> bool:
    """Whether a division that rounds towards zero, as C's and Triton's do, agrees with the language's, which rounds
    down."""
    if isinstance(x, sympy.Symbol | sympy.Number):
        return bool(x.is_nonnegative)
    if isinstance(x, sympy.Add | sympy.Mul | language.floordiv | language.mod):
        return all(nonnegative(argument) for argument in x.args)
    return False
