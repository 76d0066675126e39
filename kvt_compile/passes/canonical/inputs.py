"""Which placeholders of a graph are inputs of the model, and what the model calls them.

A capture writes down what it knows under `INPUT` (`capture/inputs.py`); elsewhere an input has its placeholder's name.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvt_compile.passes.canonical.values import Value

INPUT = "kvt_input"
"""The key in a placeholder's meta of what its model calls it; empty where it is none of the model's inputs: it crosses
a graph break, or comes from the layer before, or goes into a graph within the graph."""


def input_name(value: Value) -> str:
    """What the model calls its input that this value is; empty where it is none."""
    if value.kind != "source" or value.origin != "input" or value.node.op != "placeholder":
        return ""
    return str(value.node.meta.get(INPUT, value.node.target))


def input_ranks(values: Iterable[Value]) -> dict[str, int]:
    """Name -> number of axes; the empty name where some placeholder is none of the model's inputs."""
    return {input_name(x): len(x.shape) for x in values if x.kind == "source" and x.origin == "input"}
