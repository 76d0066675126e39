"""Which tensors torch says need a gradient, though none flows: its views of tensors that need one, made without grad.

    with torch.no_grad():  q = x.mT          q.requires_grad is that of x, q.grad_fn is None
    (q @ q.mT).softmax(-1) @ q               needs a gradient as well, and gives none to x

A fused site reads x itself, so what it reads of x must say the same, or a backward that runs in the model has nothing
to start from in the rewritten one.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kvt_compile.passes.canonical.modes import Mode, modes_of
from kvt_compile.passes.canonical.state import memory_of
from kvt_compile.passes.canonical.values import meta_value

_CUTS = frozenset({"detach", "detach_", "data"})


def needs_as_much_as(node: fx.Node, entry: Mode) -> frozenset[fx.Node]:
    """The nodes whose `requires_grad` makes that of `node`'s tensor, in a graph that starts in `entry`."""
    modes = modes_of(node.graph, entry)
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here in found:
            continue
        found.add(here)
        if _name(here) in _CUTS:
            continue
        if modes[here].records:
            waiting += here.all_input_nodes
        else:
            memory = _memory(here)
            waiting += [x for x in here.all_input_nodes if memory & _memory(x)]
    return frozenset(found)


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    attribute = node.op == "call_function" and node.target is getattr
    return str(node.args[1]) if attribute else getattr(node.target, "__name__", "").partition(".")[0]


def _memory(node: fx.Node) -> set[int | None]:
    """The storages of what a node returns; fake tensors share them exactly when the real ones do."""
    leaves = pytree.tree_leaves(meta_value(node))
    return {memory_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)} - {None}
