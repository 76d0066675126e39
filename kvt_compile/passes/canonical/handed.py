"""Calls that hand on the very tensor they were given, which keeps its gradient whatever mode they run in.

    with torch.no_grad():  y = x.contiguous()      x itself, where it is contiguous; else a copy without gradient
                           y = x.view(x.shape)     another tensor in any case, without gradient

Which calls do depends on dtype, strides, device and arguments: the call is made again, on fakes like those a capture
left.  (On those themselves it would decide about sizes that are dynamic.)  Dynamo itself leaves copies behind dropout
that drops nothing, where eager mode leaves the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from kvt_compile.passes.canonical.state import same_place
from kvt_compile.passes.canonical.values import meta_value


def hands_on(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether what a call returns, or a part of it, is a tensor that it was given.  Not for calls that write."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    given = [x for n in node.all_input_nodes for x in _tensors(meta_value(n))]
    if "dropout" not in _name(node, modules) and not any(
        same_place(x, y) for x in _tensors(meta_value(node)) for y in given
    ):
        return False
    try:
        with FakeTensorMode():
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: pytree.tree_map(_like, meta_value(n)))
            returned = _call(node, modules)(*args, **kwargs)
    except Exception:  # what it needs is not at hand: it is read as a call that makes a tensor
        return False
    return any(x is y for x in _tensors(returned) for y in _tensors((args, kwargs)))


def _like(x: Any) -> Any:
    """A fake tensor of this size and these strides, or a number, that no dynamic size depends on."""
    if isinstance(x, torch.Tensor):
        sizes = [[_like(size) for size in of] for of in (x.shape, x.stride())]
        return torch.empty_strided(*sizes, dtype=x.dtype, device=x.device)
    return x.node.hint if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x


def _name(node: fx.Node, modules: dict[str, torch.nn.Module]) -> str:
    of = type(modules[str(node.target)]) if node.op == "call_module" else node.target
    return str(getattr(of, "__name__", of)).lower()


def _call(node: fx.Node, modules: dict[str, torch.nn.Module]) -> Any:
    if node.op == "call_module":
        return modules[str(node.target)]
    return getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target


def _tensors(x: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, torch.Tensor)]
