"""What functions of a selection (`given`) brought into a graph of Dynamo -> what Dynamo and compilers are told of it.

    kvt_given_0.down.weight, a parameter of the graph that Dynamo did not put there
      ->  kvt_held.1.weight, once, however many functions and nested graphs have its module
      ->  a source, which AOTAutograd asks for when it makes it an input
      ->  a guard: with another tensor in its place, or another mode, the graph is compiled anew

What such a function does is in no key of a compile cache: torch takes a module in a graph for one of its own, whose
code never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import fx, nn

from kvt_compile.capture.frames import add_guard, install_global
from kvt_compile.passes.pipeline import PassResult, nested_graphs
from kvt_compile.passes.rewriting.given import ConditionTensors
from kvt_compile.passes.rewriting.trial import PLAIN

PREFIX = "__kvt_given"
HELD = "kvt_held"


def note_held(gm: fx.GraphModule) -> None:
    """Tells Dynamo of every tensor of the functions in a graph that it captured."""
    functions = list(_hidden(gm))
    if not functions:
        return
    gm.add_submodule(HELD, Held(functions))
    known = getattr(gm, "_param_name_to_source", None)
    if known is None:
        return
    tensors = chain(gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if name not in known and (source := install_global(PREFIX, tensor)) is not None:
            known[name] = source
    add_guard(_unchanged(functions), "kvt: the functions of a selection are as they were")


class Held(nn.Module):
    """Every module of some functions once, under a number.

    AOTAutograd puts its own tensors in the place of a graph's, by their names, and takes them out again in the same
    order: what has two names would keep one of them."""

    def __init__(self, functions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.all = tuple(dict.fromkeys(module for function in functions for module in function.modules()))
        self.__dict__ |= {str(number): module for number, module in enumerate(self.all)}

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self
        for number, module in enumerate(self.all):
            yield f"{prefix}.{number}".lstrip("."), module


def _hidden(gm: fx.GraphModule) -> Iterator[nn.Module]:
    """The functions in a graph and those nested in it, which are attributes of it from now on, and no children."""
    for graph in nested_graphs(gm):
        for node in graph.graph.nodes:
            if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), ConditionTensors):
                for called in node.args[2:]:
                    function = graph.get_submodule(str(called.target))
                    if graph._modules.pop(str(called.target), None) is not None:
                        graph.__dict__[str(called.target)] = function
                    yield function


def _unchanged(functions: Iterable[nn.Module]) -> Any:
    modules = list(dict.fromkeys(module for function in functions for module in function.modules()))
    before = [(module, _numbers(module), _parts(module)) for module in modules]

    def test(variables: Mapping[str, Any]) -> bool:
        return all(
            numbers == _numbers(module) and _identical(parts, _parts(module)) for module, numbers, parts in before
        )

    return test


def _numbers(module: nn.Module) -> dict[str, Any]:
    """What it may decide by: its mode, and numbers and words that it was made with."""
    return {name: value for name, value in vars(module).items() if type(value) in PLAIN}


def _parts(module: nn.Module) -> dict[str, Any]:
    return {**module._parameters, **module._buffers, **module._modules}


def _identical(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return before.keys() == now.keys() and all(now[name] is x for name, x in before.items())


@contextmanager
def uncached(result: PassResult) -> Iterator[None]:
    """Where a function is in a graph, AOTAutograd's cache is left out while this is open: it would keep what it can
    never serve again.  Inductor's own, which goes by what the function computes, is not."""
    if not result.has_functions:
        yield
        return
    import torch._functorch.config as config

    patched: Any = config
    with patched.patch(enable_autograd_cache=False):
        yield
