"""Score and weight expressions -> programs of their derivatives, and where a captured tensor's gradient goes.

dt -> ds = dt * df/ds             dc_n[index] += dt * df/dc_n           f: score expression
dw -> dp = dw * dg/dp             dc_n[index] += dw * dg/dc_n           g: weight expression

Scores of keys that were dropped get none where a slope may be infinite or NaN.  What a weight expression captures gets
its own of every key: a weight need not be 0 where p is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from kvt_compile.kernels.c.program import Builder, Program
from kvt_compile.kernels.c.scalar import ScalarPrinter, depends_on
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative, is_multiple
from kvt_compile.kernels.op.spec import KernelSpec


@dataclass(frozen=True)
class Scatter:
    """One captured load whose gradient is collected."""

    slot: int
    result: int
    """Which result of the derivative program it is."""
    offset: str
    """C: where the element stands in the contiguous gradient."""
    over: str
    """What its index depends on of the tile: "", "i", "j" or "ij"."""
    text: str


def score_gradient(spec: KernelSpec, scalar: ScalarPrinter) -> tuple[Program, tuple[Scatter, ...]]:
    """The program with results (ds, dc, ...) and the captured loads they belong to."""
    return _gradient(spec, scalar, spec.score_expression, language.s, spec.score_loads)


def weight_gradient(spec: KernelSpec, scalar: ScalarPrinter) -> tuple[Program | None, tuple[Scatter, ...]]:
    """The same for the weight expression; None where it is p itself."""
    if spec.weight == "p":
        return None, ()
    return _gradient(spec, scalar, spec.weight_expression, language.p, spec.weight_loads)


def _gradient(
    spec: KernelSpec,
    scalar: ScalarPrinter,
    expression: sympy.Expr,
    symbol: sympy.Symbol,
    loads: tuple[language.load, ...],
) -> tuple[Program, tuple[Scatter, ...]]:
    wanted = [x for x in loads if spec.captured[x.slot].is_float]
    derivatives = [derivative(expression, x) for x in (symbol, *wanted)]
    program = Builder(scalar).build(derivatives, extra=wanted)
    # of p and s, and of what the scores capture
    guarded = [n for n, d in enumerate(derivatives) if not is_multiple(d) and (n == 0 or symbol == language.s)]
    results = (f"choose(dropped, (vec){{0}}, {x})" if n in guarded else x for n, x in enumerate(program.results))
    program = replace(program, results=tuple(results))
    scatters = tuple(_scatter(x, number, scalar) for number, x in enumerate(wanted, start=1))
    return program, scatters


def _scatter(x: language.load, result: int, scalar: ScalarPrinter) -> Scatter:
    offset = "0"
    for dim in range(len(x.index)):
        position = scalar.position(x, dim)
        offset = position if dim == 0 else f"({offset}) * c{x.slot}_size{dim} + {position}"
    axes = frozenset().union(*(depends_on(index) for index in x.index))
    return Scatter(x.slot, result, offset, "".join(axis for axis in "ij" if axis in axes), language.to_text(x))


def separated_axes(spec: KernelSpec, needs_grad: tuple[bool, ...]) -> frozenset[str]:
    """Those of b, h, i that stand alone as an index in every captured load that gets a gradient: threads that differ in
    one of them never write the same element."""
    common = frozenset("bhi")
    place: dict[tuple[int, str], int] = {}
    for x in (*spec.score_loads, *spec.weight_loads):
        if not needs_grad[3 + x.slot]:
            continue
        names = [str(index) for index in x.index]
        # c[i, j] + c[j, i]: there i stands alone twice, but meets itself in another dimension
        common &= {
            axis
            for axis in "bhi"
            if axis in names and place.setdefault((x.slot, axis), names.index(axis)) == names.index(axis)
        }
    return common
