"""Values -> the formula a person would write: what stands between two products that is no softmax.

div(exp(s), add(sum(exp(s)), 1))   ->   exp(s) / (sum(exp(s)) + 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvt_compile.passes.canonical.values import Value

_SIGNS = {"add": ("+", 1), "biased": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2),
          "pow": ("**", 3), "power_of_number": ("**", 3)}  # fmt: skip
_ATOM = 4
_SAME = ("identity", "clone")
_MOST = 160


def formula(value: Value, names: Mapping[Value, str]) -> str:
    """The text of a value in terms of `names`; layouts and casts are not shown, and a long text is cut."""
    text = _text(value, names, 0, 24)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def _text(x: Any, names: Mapping[Value, str], outer: int, depth: int) -> str:
    if not isinstance(x, Value):
        return f"{x:g}" if isinstance(x, int | float) else str(x)
    if x in names:
        return names[x]
    if depth == 0:
        return "..."
    if x.kind in ("layout", "border") or (x.kind == "pointwise" and x.name in _SAME):
        return _text(x.inputs[0], names, outer, depth)
    if x.kind == "source" or not x.inputs:
        return (x.holder or x.node).name
    if x.kind == "pointwise" and x.name in _SIGNS and len(x.inputs) == 2:
        sign, level = _SIGNS[x.name]
        left, right = (_text(y, names, level + n, depth - 1) for n, y in enumerate(x.inputs))
        text = f"{left}**{right}" if sign == "**" else f"{left} {sign} {right}"
        return f"({text})" if level < outer else text
    if x.kind == "pointwise" and x.name == "neg":
        return f"-{_text(x.inputs[0], names, _ATOM - 1, depth - 1)}"
    if x.kind == "pointwise" and x.name in ("constant", "fill"):
        return _text(x.inputs[0], names, outer, depth)
    if x.kind == "reduce" and len(x.attrs["dims"]) > 1:
        return f"{x.name}({_text(x.inputs[0], names, 0, depth - 1)}, over {len(x.attrs['dims'])} axes)"
    arguments = [_text(y, names, 0, depth - 1) for y in x.inputs if isinstance(y, Value | int | float)]
    return f"{x.name}({', '.join(arguments)})"
