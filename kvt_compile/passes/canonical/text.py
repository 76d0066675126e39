"""Values of a canonical graph -> text, one line a value, numbered as they come: what a test or a person reads.

    v0: f32[2, 3, 5, 4] = input q
    v1: f32[2, 3, 5, 4] = input k
    v2: f32[2, 3, 4, 5] = permute(v1, dims=(0, 1, 3, 2))
    v3: f32[2, 3, 5, 5] = contraction(v0, v2, "abcd,abde->abce")
    v4: f32[2, 3, 5, 5] = softmax(v3, dim=3)

`...` stands for what is not shown.  Nothing in a line depends on how torch names or numbers nodes, but for the names of
inputs, parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import ascii_letters
from typing import Any

import sympy
import torch

from kvt_compile.passes.canonical.values import Value

_SHORT = {"float": "f", "int": "i", "uint": "u", "complex": "c", "bfloat": "bf", "bool": "bool"}
_NOT_SHOWN = ("fn", "call", "given", "selection", "unread", "absorbed")
"""What a person cannot read."""


def canonical_text(values: Iterable[Value]) -> str:
    """The values' lines, in the order they are given; an operand that is not among those before is `...`."""
    names: dict[Value, str] = {}
    lines: list[str] = []
    for value in values:
        lines.append(f"v{len(names)}: {_type(value)} = {_meaning(value, names)}")
        names[value] = f"v{len(names)}"
    return "\n".join(lines)


def _type(value: Value) -> str:
    return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"


def _dtype(dtype: torch.dtype | None) -> str:
    """torch.bfloat16 -> bf16"""
    name = str(dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    return f"{_SHORT[kind]}{name[len(kind) :]}" if kind in _SHORT else name


def _meaning(value: Value, names: Mapping[Value, str]) -> str:
    if value.kind == "source":
        return f"{value.origin} {value.node.name}"
    operands = [_argument(x, names) for x in value.inputs]
    if value.inputs and operands and all(x == "..." for x in operands):
        operands = ["..."]  # none of them is shown: a leaf
    elif value.kind == "contraction":
        operands.append(_labels(value))
    if value.kind == "contraction":
        return f"contraction({', '.join(operands)})"
    attributes = {key: x for key, x in sorted(value.attrs.items()) if key not in _NOT_SHOWN and x not in (None, "")}
    operands += [f"{key}={_argument(x, names)}" for key, x in attributes.items()]
    return f"{'opaque ' if value.kind == 'opaque' else ''}{value.name}({', '.join(operands)})"


def _argument(x: Any, names: Mapping[Value, str]) -> str:
    match x:
        case Value():
            return names.get(x, "...")
        case tuple() | list():
            return f"({', '.join(_argument(item, names) for item in x)}{',' if len(x) == 1 else ''})"
        case torch.dtype():
            return _dtype(x)
        case sympy.Expr():
            return str(x)
    return repr(x)


def _labels(value: Value) -> str:
    """The labels as an einsum would have them; `1` is a dimension of size 1 that is broadcast."""
    letters: dict[Any, str] = {}

    def word(labels: Iterable[Any]) -> str:
        return "".join("1" if x is None else letters.setdefault(x, ascii_letters[len(letters)]) for x in labels)

    left, right = word(value.attrs["lhs"]), word(value.attrs["rhs"])
    return f'"{left},{right}->{word(value.attrs["out"])}"'
