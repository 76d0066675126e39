"""What torch 2.11's Dynamo writes otherwise than later ones, read alike in every torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch.fx as fx

from kvt_compile.passes.canonical.spellings import canonical_name, read_call


def method(name: str) -> str | None:
    graph = fx.Graph()
    call = read_call(graph.call_method(name, (graph.placeholder("x"), 1)), {})
    return call and call.name + "_" * call.inplace


@pytest.mark.parametrize("name", ["eq", "lt", "add", "truediv", "matmul", "imul", "getitem"])
def test_an_operator_as_a_method(name: str) -> None:
    assert method(f"__{name}__") == canonical_name(getattr(operator, name))


def test_neighbour_reversed_operators() -> None:
    """`x.__rsub__(1)` is 1 - x, `x.__radd__` has no operator."""
    assert method("__rsub__") not in ("sub", "sub_")


def written(name: str, module: str) -> Callable[..., Any]:
    def prim(x: Any) -> Any:
        return x

    prim.__name__, prim.__module__ = name, module
    return prim


@pytest.mark.parametrize(
    ("name", "meant"),
    [("prim_to_local", "to_local"), ("prim from_local", "from_local"), ("prim_redistribute", "redistribute")],
)
def test_calls_of_dtensor(name: str, meant: str) -> None:
    assert canonical_name(written(name, "torch._dynamo.variables.tensor")) == meant


def test_neighbours_other_functions_of_those_names() -> None:
    assert canonical_name(written("prim_to_local", "mine")) is None
    assert canonical_name(written("prim_softmax", "torch._dynamo.variables.tensor")) is None
    assert canonical_name(written("to_local", "torch._dynamo.variables.tensor")) is None
