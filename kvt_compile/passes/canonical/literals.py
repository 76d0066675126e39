"""A tensor that the model writes as numbers -> the one number it holds everywhere, where it always does.

node.meta[LITERAL] = tensor(0.)   ->   0.0         left there by a capture that knows who made the tensor
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from kvt_compile.passes.canonical.spellings import read_call
from kvt_compile.passes.canonical.state import builtin_call, storage_of
from kvt_compile.passes.canonical.values import LITERAL
from kvt_compile.passes.canonical.versions import mutates

Modules = dict[str, nn.Module]


def literal_number(node: fx.Node, modules: Modules) -> float | int | None:
    """The number; None for a node that is no literal, holds several numbers, or whose memory somebody may write to."""
    held = node.meta.get(LITERAL)
    if not isinstance(held, torch.Tensor) or held.layout is not torch.strided or not held.numel():
        return None
    if held.dtype is torch.bool or held.is_complex():
        return None
    one = held.flatten()[0]
    alike = torch.equal(held, one.expand_as(held)) and torch.equal(held.signbit(), one.signbit().expand_as(held))
    if not alike or _reached_by(node, modules, _may_write):
        return None
    number: float | int = one.item()
    return number


def is_written(node: fx.Node, modules: Modules) -> bool:
    """Whether the graph itself writes to a tensor's memory, or returns it to somebody who may."""
    return _reached_by(node, modules, _writes)


def _reached_by(node: fx.Node, modules: Modules, asked: Callable[[fx.Node, Modules], bool]) -> bool:
    storage = storage_of(node)
    given = (x for other in node.graph.nodes if asked(other, modules) for x in other.all_input_nodes)
    return any(x is node or (storage is not None and storage_of(x) == storage) for x in given)


def _may_write(node: fx.Node, modules: Modules) -> bool:
    """Whether it writes, or is none of torch's own operations."""
    if node.op in ("placeholder", "get_attr"):
        return False
    known = builtin_call(node) or read_call(node, modules) or isinstance(node.target, torch._ops.OpOverload)
    return not known or _writes(node, modules)


def _writes(node: fx.Node, modules: Modules) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "output":
        return True
    call = builtin_call(node) or read_call(node, modules)
    if call is None:
        return mutates(node)
    return call.name == "setitem" or (call.name != "detach" and (call.inplace or mutates(node)))
