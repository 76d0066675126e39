"""Tensors that a model writes as numbers, in a captured graph: what they hold is known before it runs.

    p.masked_fill(m, torch.tensor(0.0))     by a symbolic trace:  _tensor_constant0, a tensor made while it was traced
                                            by torch.export:      lift_fresh_copy(lifted_tensor_0)

A buffer, an attribute and a global tensor of the user look alike there, and hold what they hold until somebody writes
to them: they are no literals.  Dynamo has the call itself in its graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from kvt_compile.capture.watching import Watching
from kvt_compile.passes.canonical.literals import is_written
from kvt_compile.passes.canonical.spellings import canonical_name
from kvt_compile.passes.canonical.values import LITERAL

_MAKE = frozenset(
    {"tensor", "scalar_tensor", "zeros", "ones", "full", "arange", "eye", "linspace", "zeros_like", "ones_like",
     "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}
)  # fmt: skip
"""What makes a tensor of numbers.  `as_tensor` and `from_numpy` may share the memory of what they are given."""
_LIFTED = re.compile(r"lifted_tensor_\d+")
_COPIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


class Making(Watching):
    """Notes tensors that are made of numbers while it is on, and of such tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.Tensor] = {}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if type(result) is torch.Tensor:
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            like = canonical_name(func) in _MAKE
            if like or (given and all(map(self.made, given))):
                self._made[id(result)] = result
        return result

    def made(self, x: Any) -> bool:
        return self._made.get(id(x)) is x


def note_made(gm: fx.GraphModule, making: Making) -> str:
    """Writes the literals of a symbolic trace, whose nodes have shapes, into the meta of their nodes.

    Returns the name of one that the graph writes to or returns, empty where there is none: the model makes it anew in
    every call, and the graph would not."""
    modules = dict(gm.named_modules())
    for node in gm.graph.nodes:
        value = attribute(gm, node) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor) and making.made(value):
            node.meta[LITERAL] = value
            if is_written(node, modules):
                return str(node.name)
    return ""


def attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What a get_attr node reads, of a submodule or of the module itself."""
    return operator.attrgetter(str(node.target))(gm)


def note_lifted(program: ExportedProgram, alone: bool) -> None:
    """The same for a program of torch.export.

    alone: whether the program is a copy, which shares its constants with nobody."""
    held: Mapping[str, Any] = program.constants
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph_module.graph.nodes:
        value = held.get(name) if (name := lifted.get(node.name, "")) else None
        if not isinstance(value, torch.Tensor) or not _LIFTED.fullmatch(name):
            continue
        copied = all(user.target in _COPIES for user in node.users)
        if alone or (copied and value.untyped_storage().resizable()):  # memory of numpy's is not
            node.meta[LITERAL] = value
