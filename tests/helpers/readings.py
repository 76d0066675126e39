"""A small model -> what the passes read of it, as index arithmetic, evaluated with plain torch indexing.

    y = x.flatten(1)[:, 2:]   --read-->   "c0[b, (h + 2) // 4, (h + 2) % 4]"   --evaluate-->   a tensor like y

The evaluation shares nothing with the passes or the kernels but the text: Python's own `eval` on integer tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from fuzz_check import traced
from torch import Tensor, fx, nn

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.canonicalise import canonicalise
from kvt_compile.passes.canonical.coords import Axes, Coord, Space
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.reading.facts import gather_facts
from kvt_compile.passes.reading.read import OPAQUE, Leaf, Reader

AXES = "bhij"
_SYMBOLS = {name: getattr(language, name) for name in AXES}


def module_of(function: Callable[..., Tensor]) -> nn.Module:
    """A module whose forward is a function of positional tensors."""
    names = ", ".join(inspect.signature(function).parameters)
    forward = eval(f"lambda self, {names}: function({names})", {"function": function})
    module: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    return module


@dataclass(frozen=True)
class Reading:
    """The expression of a model's first output over its sources; `opaque` when something could not be followed."""

    text: str
    sources: tuple[fx.Node, ...]
    opaque: bool


def read_module(
    model: nn.Module,
    inputs: Sequence[Tensor],
    capture: Callable[[nn.Module, Sequence[Tensor]], fx.GraphModule] = traced,
    through: Callable[[Value], bool] = lambda value: True,
) -> Reading:
    """Reads the first output back to the graph's inputs and parameters.  The output has at most four dimensions."""
    return read_graph(capture(model, inputs), through)


def read_graph(graph: fx.GraphModule, through: Callable[[Value], bool] = lambda value: True) -> Reading:
    canonical = canonicalise(graph)
    value = canonical.outputs[0]
    space = Space()
    out = tuple(space.fresh(name, size) for name, size in zip(AXES, value.shape, strict=False))
    reader = Reader(space, through, gather_facts(canonical).cost)
    expression = reader.read(value, out)
    leaves = [leaf for leaf in reader.leaves if leaf.symbol in expression.free_symbols]
    axes = {name: tuple(space.resolve(coord).digits) for name, coord in zip(AXES, out, strict=False)}
    printer = Axes(space, axes, _SYMBOLS)
    opaque = expression.has(OPAQUE) or any(leaf.value.kind != "source" for leaf in leaves)
    if opaque:
        return Reading(str(expression), (), True)
    sources = tuple(dict.fromkeys(leaf.value.node for leaf in leaves))
    loads: dict[Any, Any] = {leaf.symbol: _load(leaf, sources, printer) for leaf in leaves}
    loads |= {symbol: printer.text(coord) for symbol, coord in reader.positions.items()}
    return Reading(language.to_text(expression.xreplace(loads)), sources, False)


def _load(leaf: Leaf, sources: tuple[fx.Node, ...], printer: Axes) -> sympy.Expr:
    return language.load(sources.index(leaf.value.node), *(printer.text(c) for c in leaf.coords))


class _Source:
    """c0[...]: out-of-range indices are clamped, as the contract allows them in the branch a `where` does not take."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        listed = index if isinstance(index, tuple) else (index,)
        return self._tensor[
            tuple(torch.as_tensor(n).clamp(0, size - 1) for n, size in zip(listed, self._tensor.shape, strict=True))
        ]


_FUNCTIONS: dict[str, Any] = {
    "where": lambda c, x, y: torch.where(c, torch.as_tensor(x), torch.as_tensor(y)),
    "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_not": torch.logical_not,
    "lt": lambda x, y: torch.as_tensor(x < y), "le": lambda x, y: torch.as_tensor(x <= y),
    "gt": lambda x, y: torch.as_tensor(x > y), "ge": lambda x, y: torch.as_tensor(x >= y),
    "eq": lambda x, y: torch.as_tensor(x == y), "ne": lambda x, y: torch.as_tensor(x != y),
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "abs": torch.abs, "relu": torch.relu,
    "sqrt": torch.sqrt, "clamp": torch.clamp, "hardtanh": torch.clamp,
    "maximum": torch.maximum, "minimum": torch.minimum, "oo": float("inf"),
}  # fmt: skip


def evaluate(text: str, shape: Sequence[int], sources: Sequence[Tensor]) -> Tensor:
    """The tensor of this shape whose element [b, h, i, j] is the expression."""
    grid = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij") if shape else ()
    names: dict[str, Any] = dict(zip(AXES, grid, strict=False)) | dict.fromkeys(AXES[len(shape) :], 0)
    for n, tensor in enumerate(sources):
        names[f"c{n}"] = _Source(tensor) if tensor.dim() else tensor
    value: Tensor = torch.as_tensor(eval(text, _FUNCTIONS | names))
    return value.expand(tuple(shape))


def assert_reads(
    model: nn.Module,
    inputs: Sequence[Tensor],
    capture: Callable[[nn.Module, Sequence[Tensor]], fx.GraphModule] = traced,
) -> Reading:
    """Asserts that the reading, where there is one, is what the model computes."""
    with torch.no_grad():
        expected = model(*(x.clone() for x in inputs))
    graph = capture(model, inputs)
    reading = read_graph(graph)
    if reading.opaque:
        return reading
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    by_node = dict(zip(placeholders, inputs, strict=False))
    sources = [by_node[n] if n in by_node else _attribute(graph, str(n.target)) for n in reading.sources]
    actual = evaluate(reading.text, expected.shape, sources)
    assert torch.allclose(actual.to(expected.dtype), expected, rtol=1e-12, atol=1e-12), (
        f"{reading.text}\n{actual}\nexpected\n{expected}\n{graph.code}"
    )
    return reading


def _attribute(graph: fx.GraphModule, target: str) -> Tensor:
    found: Any = graph
    for part in target.split("."):
        found = getattr(found, part)
    value: Tensor = found.detach()
    return value


def value_of(space: Space, coord: Coord, roots: dict[Any, int]) -> int:
    """The number a coordinate stands for when the atoms it was made from count to these values."""
    total = 0
    for atom in space.resolve(coord).digits:
        total = total * int(atom.size) + _digit(space, atom, roots)
    return coord.start + coord.step * total


def _digit(space: Space, atom: Any, roots: dict[Any, int]) -> int:
    if atom in roots:
        return roots[atom]
    if atom.derived is not None:
        return value_of(space, atom.derived.of, roots) - int(atom.derived.start)
    parent = space.parent_of(atom)
    assert parent is not None
    whole, is_high = parent
    parts = space.parts(whole)
    assert parts is not None
    value, low = _digit(space, whole, roots), int(parts[1].size)
    return value // low if is_high else value % low
