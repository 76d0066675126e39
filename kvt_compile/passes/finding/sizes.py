"""Operands -> where each size that is known only at run time can be read.

q (B*H, N, D) as [(b, h), (i), (d)], b and i dynamic, H a number   ->   i = size(q, 1),  b = size(q, 0) // H
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvt_compile.passes.canonical.coords import Atom
from kvt_compile.passes.canonical.values import product, same
from kvt_compile.passes.site import Operand


@dataclass(frozen=True)
class SizeSource:
    """The atom's size is that of a dimension of an operand, divided by the sizes of the other digits there."""

    operand: Operand
    dim: int
    others: tuple[Atom, ...]


def size_sources(operands: Sequence[Operand]) -> dict[Atom, SizeSource]:
    """Dynamic atom -> its source, in an order in which the `others` of each are numbers or stand before it."""
    dims = [(operand, dim) for operand in operands for dim in range(len(operand.coords)) if not is_part(operand, dim)]
    dims.sort(key=lambda place: len(place[0].coords[place[1]].digits))
    sources: dict[Atom, SizeSource] = {}
    before = -1
    while len(sources) > before:
        before = len(sources)
        for operand, dim in dims:
            digits = operand.coords[dim].digits
            unknown = [a for a in digits if not isinstance(a.size, int) and a not in sources]
            if len(unknown) == 1:
                sources[unknown[0]] = SizeSource(operand, dim, tuple(a for a in digits if a is not unknown[0]))
    return sources


def is_part(operand: Operand, dim: int) -> bool:
    """Whether the coordinate leaves out elements of the dimension, or takes them in another order."""
    coord = operand.coords[dim]
    return not (coord.plain and same(product(a.size for a in coord.digits), operand.value.shape[dim]))
