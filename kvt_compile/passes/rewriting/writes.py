"""A graph -> which memory it writes to, when, and what it hands out: what an operator saves for its backward must not
be among it.

    o = kvt.attention(q, k, v, [bias], ...)[0];  o += 1;  bias.zero_()      o and bias are saved, and written afterwards
      ->  the model goes on with o.clone(), and the operator reads bias.clone()

The model's own operations saved neither.  Nothing is copied where nothing is written later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from kvt_compile.passes.canonical.modes import Mode, modes_of
from kvt_compile.passes.canonical.spellings import read_call
from kvt_compile.passes.canonical.state import builtin_call, memory_of
from kvt_compile.passes.canonical.values import meta_value
from kvt_compile.passes.canonical.versions import mutates
from kvt_compile.passes.rewriting.flags import needs_as_much_as

Modules = dict[str, nn.Module]
_WRITES_NOTHING = frozenset({"detach", "requires_grad"})
"""Named like writes; they change what torch knows of a tensor, and none of its numbers."""


class Writes:
    """Of a graph that starts in mode `entry`, as it is before anything in it is rewritten."""

    def __init__(self, gm: fx.GraphModule, entry: Mode) -> None:
        self._entry = entry
        self._modules = dict(gm.named_modules())
        self._modes = modes_of(gm.graph, entry)
        self._place = {node: n for n, node in enumerate(gm.graph.nodes)}
        self._last: dict[int, int] = {}
        self._returned: set[int] = set()
        for node, n in self._place.items():
            if node.op == "output":
                self._returned |= _memory(node.all_input_nodes)
            else:
                self._last |= dict.fromkeys(_memory(_written_by(node, gm, self._modules)), n)

    def mode(self, node: fx.Node) -> Mode:
        """The mode a node of the graph runs in."""
        return self._modes[node]

    def overwrites(self, held: fx.Node, after: fx.Node) -> bool:
        """Whether what a backward through the node `after` reads of a tensor is gone by then, as the graph writes to
        the tensor's memory."""
        written = max((self._last.get(memory, -1) for memory in _memory([held])), default=-1)
        return self._modes[after].records and written > self._place[after]

    def hands_out(self, result: fx.Node) -> bool:
        """Whether the caller gets a tensor of this memory, and may write to it before a backward comes through."""
        if not self._modes[result].records or self._returned.isdisjoint(_memory([result])):
            return False
        return any(map(self._needs_grad, needs_as_much_as(result, self._entry)))

    def _needs_grad(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(x.requires_grad for x in self._modules[str(node.target)].parameters())
        fake = meta_value(node)
        return node.op in ("placeholder", "get_attr") and isinstance(fake, torch.Tensor) and fake.requires_grad


def _memory(nodes: Iterable[fx.Node]) -> set[int]:
    leaves = pytree.tree_leaves([meta_value(node) for node in nodes])
    memories = (memory_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
    return {memory for memory in memories if memory is not None}


def _written_by(node: fx.Node, gm: fx.GraphModule, modules: Modules) -> list[fx.Node]:
    """The nodes whose tensors a node writes to; all that it reads where that is not known."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        writes = "mutation" in str(node.target) or any(_writes_to_inputs(body) for body in _bodies(node, gm))
        return node.all_input_nodes if writes else []
    call = builtin_call(node) or read_call(node, modules)
    if call is not None and call.name in _WRITES_NOTHING:
        return []
    if not mutates(node) and not (call is not None and (call.inplace or call.name == "setitem")):
        return []
    return _nodes_in(_targets(node)) or node.all_input_nodes


def _targets(node: fx.Node) -> Iterator[Any]:
    """The arguments that are written to."""
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
    elif node.kwargs.get("out") is not None:
        yield node.kwargs["out"]
    elif not isinstance(node.target, torch._ops.OpOverloadPacket):
        yield node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _nodes_in(argument: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(list(argument), nodes.append)
    return nodes


def _bodies(node: fx.Node, gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for given in node.all_input_nodes:
        body = getattr(gm, str(given.target), None) if given.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body


def _writes_to_inputs(body: fx.GraphModule) -> bool:
    modules = dict(body.named_modules())
    inputs = _memory(node for node in body.graph.nodes if node.op == "placeholder")
    return any(not inputs.isdisjoint(_memory(_written_by(node, body, modules))) for node in body.graph.nodes)
