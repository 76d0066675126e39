"""Generated source -> the same without one of its parts, to see what the part costs.  Its results are wrong, and
unused.

search        `select` answers at once: what is left is one pass over K and V
exponentials  a kept score is its own weight
values        nothing is multiplied with V
"""

from __future__ import annotations

import ast
from typing import Any

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.module import load

CUTS = {
    "search": ("select", "zero = tl.zeros_like(top_of(real_row))\n    return zero, zero + 4.0"),
    "exponentials": ("kept_exponentials", "return tl.where(t >= threshold[:, None], t - shift[:, None], 0.0)"),
    "values": ("add_values", "return {accumulators}"),
}
"""Part -> the function whose body is replaced, and by what."""


class NoSuchPartError(ValueError):
    """The source has no function of that name."""


def without(source: str, part: str) -> str:
    """Raises NoSuchPartError where the part's function is not in the source."""
    name, body = CUTS[part]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            lines = source.splitlines(keepends=True)
            arguments = [argument.arg for argument in node.args.args]
            accumulators = ", ".join(x for x in arguments if x.startswith("acc"))
            body = body.format(accumulators=accumulators).replace("top_of(real_row)", "real_row.to(REAL)")
            assert node.end_lineno is not None
            first = node.body[0].lineno - 1
            return "".join([*lines[:first], f"    {body}\n", *lines[node.end_lineno :]])
    raise NoSuchPartError(f"the generated source has no function {name}, which the part {part!r} is")


class Ablated(Launcher):
    """Launches forwards without a part, with the block sizes of the whole kernel."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def kernel(self, spec: KernelSpec | SoftmaxSpec, part: str) -> Any:
        return getattr(load(without(module_source(spec), self.part)), part)
