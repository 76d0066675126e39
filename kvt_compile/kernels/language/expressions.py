"""What every generator of code asks about score expressions: which indices are safe, which divisions agree.

An index that is one coordinate, outside every where(), is checked once at launch (`check_captured`); every other is
clamped at each load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import sympy
import torch

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.op.spec import KernelSpec

COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class NotGenerated(ValueError):  # noqa: N818 - the reason is shown to people as it is
    """The reason why an expression cannot be written in a generator's language."""


def plain_index(index: sympy.Expr) -> bool:
    """True for a constant or one coordinate: what is checked once at launch instead of clamped at every load."""
    return isinstance(index, sympy.Integer) or index in (language.b, language.h, language.i, language.j)


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


def check_captured(spec: KernelSpec, shapes: Sequence[Sequence[int]], extents: dict[str, int]) -> None:
    """Raises ValueError when a coordinate that indexes a captured tensor (of the given shape) outside every where()
    leaves the tensor: such indices are not clamped in the kernel."""
    for slot, dim, name, value in _unclamped(spec):
        needed = extents[name] if name else value + 1
        if not surely(shapes[slot][dim] >= needed):
            raise ValueError(
                f"captured tensor {slot} has size {shapes[slot][dim]} in dimension {dim}, "
                f"which is indexed by {name or value}: expected at least {needed}"
            )
    for slot, shape in enumerate(shapes):
        if not all(surely(size > 0) for size in shape):
            raise ValueError(f"captured tensor {slot} has no elements (shape {tuple(shape)})")


def surely(condition: bool | torch.SymBool) -> bool:
    """A comparison; of symbolic sizes whether it holds for all of them, with no guard that would narrow them."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


@lru_cache(maxsize=1024)
def _unclamped(spec: KernelSpec) -> tuple[tuple[int, int, str, int], ...]:
    guarded = guarded_loads(spec.score_expression) | guarded_loads(spec.weight_expression)
    found = []
    for x in {*spec.score_loads, *spec.weight_loads} - guarded:
        for dim, index in enumerate(x.index):
            if plain_index(index):
                constant = isinstance(index, sympy.Integer)
                found.append((x.slot, dim, "" if constant else str(index), int(index) if constant else 0))
    return tuple(sorted(found))
