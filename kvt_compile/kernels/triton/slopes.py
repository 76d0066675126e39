"""Score and weight expressions -> the functions of their derivatives, and where a captured tensor's gradient goes.

dt -> ds = dt * df/ds             dc_n[index] += dt * df/dc_n           f: score expression
dw -> dp = dw * dg/dp             dc_n[index] += dw * dg/dc_n           g: weight expression
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative, is_multiple
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton.scalar import Program, TilePrinter, axes_of


@dataclass(frozen=True)
class Slope:
    """A function `name(gradient, p, s, i, j, ...)`."""

    name: str
    meaning: str
    program: Program
    reads_tile: bool
    """Whether it is made of more than the gradient and numbers."""
    guarded: bool
    """Whether it may be infinite where the gradient is 0, and so is told which keys were dropped."""

    def call(self, gradient: str, symbol: str) -> str:
        """Triton: its value for a tile; `symbol`, s or p, is what the derivative's expression is made of."""
        return f"{self.name}({gradient}, {'dropped, ' if self.guarded else ''}p, {symbol}, i, j, tile, INDEX)"


@dataclass(frozen=True)
class Scatter:
    """One captured load whose gradient is collected."""

    number: int
    slot: int
    value: str
    """Triton: the gradient of the load at every score of a tile."""
    loads: tuple[str, ...]
    """Captured elements that its index reads."""
    offset: str
    """Triton: where the element stands in the contiguous gradient."""
    axes: str
    """Which of i and j its index depends on."""
    text: str


def slope(name: str, of: str, expression: sympy.Expr, printer: TilePrinter) -> Slope:
    """The function that answers a derivative of its gradient."""
    holds = language.holds(expression)  # a number alone would not have the shape of a tile
    program = printer.program(expression) if holds else Program((), "tl.zeros_like(gradient)")
    reads_tile = bool(expression.free_symbols - {language.gradient} or program.loads)
    return Slope(name, f"{of} = {language.to_text(expression)}", program, reads_tile, not is_multiple(expression))


def slopes(spec: KernelSpec, printer: TilePrinter) -> tuple[list[Slope], list[Scatter]]:
    """The functions a backward needs and the captured gradients it collects."""
    by_s = derivative(spec.score_expression, language.s)
    functions = [slope("through_score", "ds", by_s, printer)]
    if spec.weight != "p":
        by_p = derivative(spec.weight_expression, language.p)
        functions.append(slope("through_weight", "dp", by_p, printer))
    scatters: list[Scatter] = []
    sources = (
        ("score", "dt", "s", spec.score_expression, spec.score_loads),
        ("weight", "dw", "p", spec.weight_expression, spec.weight_loads),
    )
    for role, gradient, symbol, expression, loads in sources:
        for load in loads:
            if not spec.needs_grad or not spec.needs_grad[3 + load.slot]:
                continue
            name = f"through_{role}_to_{len(scatters)}"
            text = language.to_text(load)
            functions.append(slope(name, f"d{text}", derivative(expression, load), printer))
            value = functions[-1].call(gradient, symbol)
            axes: frozenset[str] = frozenset().union(*(axes_of(index) for index in load.index))
            printer.loaded = {}
            offset = printer.offset(load, "size") if load.index else "0"
            statements = printer.load_statements()
            scatters.append(Scatter(len(scatters), load.slot, value, statements, offset, "".join(sorted(axes)), text))
    return functions, scatters
