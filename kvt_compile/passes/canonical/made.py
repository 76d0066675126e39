"""Values that no node holds and that can be computed again of ones that are held: what a form adds to the model's own.

log(g), 0.69*s, where(m, s, -inf), permute(x)        the parts of a softmax that was read by algebra
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.values import Value

MADE = frozenset({"neg", "log", "mul", "add", "where", "permute", "reshape"})
"""Operations that `rewriting/emit.py` can write down."""


def log_of_weight(x: sympy.Expr) -> sympy.Expr:
    """log(x) of what is no logarithm in the model: where x is 0 it weighs nothing, and no gradient comes to it."""
    if isinstance(x, score.relu | score.hardtanh):
        return score.log(x)  # it lets none through where it is 0
    nothing = score.eq(x, score.zero)
    return score.where(nothing, -sympy.oo, score.log(score.where(nothing, score.one, x)))


def made(value: Value) -> Value:
    """The same value, marked as one that may be written down."""
    value.attrs["made"] = True
    return value


def is_made(value: Value) -> bool:
    return value.holder is None and bool(value.attrs.get("made")) and value.name in MADE


def can_be_read(value: Value) -> bool:
    """Whether some nodes hold it, or all that it is made of."""
    if value.holder is not None:
        return True
    sizes = value.name != "reshape" or all(isinstance(size, int) for size in value.shape)
    return is_made(value) and sizes and all(map(can_be_read, value.operands))


def held(value: Value) -> Iterator[Value]:
    """The values, held by nodes, that it is read from."""
    if value.holder is not None or not is_made(value):
        yield value
        return
    for operand in value.operands:
        yield from held(operand)


def name_of(value: Value) -> str:
    """Its node's name; for what is made of another value that one's, behind the operation's."""
    if is_made(value):
        return "_".join([value.name, *(name_of(x) for x in value.operands)])
    return (value.holder or value.node).name
