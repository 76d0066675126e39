"""Spelling -> canonical name: the one table of ways to write an operation.

    torch.matmul, Tensor.matmul, operator.matmul, aten.matmul.default, `a @ b`   ->   "matmul"

A function is recognised by identity (it is torch's own), never by its name alone: a user's `softmax` is not torch's.
Adding a spelling of a known operation is one line of `ALIASES`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import fx, nn

# other name -> canonical name (a name that is canonical already needs no line)
ALIASES: dict[str, str] = {
    # arithmetic
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "ipow": "pow_", "iand": "logical_and_",
    "ior": "logical_or_", "and_": "logical_and", "or_": "logical_or", "invert": "logical_not",
    "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not", "inv": "logical_not",
    "__and__": "logical_and", "__or__": "logical_or", "__invert__": "logical_not",
    "rsqrt": "rsqrt", "expit": "sigmoid", "absolute": "abs", "clip": "clamp", "clip_": "clamp_",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    # contractions
    "mv": "matmul", "bmm": "matmul", "dot": "matmul",
    # softmax and attention
    "_softmax": "softmax", "_safe_softmax": "softmax", "_log_softmax": "log_softmax",
    "__rpow__": "rpow",
    # layout
    "_unsafe_view": "view", "_reshape_alias": "reshape", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "concat": "cat", "concatenate": "cat", "tile": "repeat", "broadcast_to": "expand",
    "ravel": "flatten", "unsafe_chunk": "chunk", "unsafe_split": "split", "split_with_sizes": "split",
    # the same values
    "clone": "identity", "contiguous": "identity", "alias": "identity", "positive": "identity",
    "lift_fresh_copy": "identity", "lift_fresh": "identity", "native_dropout": "native_dropout", "cuda": "identity",
    "cpu": "identity", "_to_copy": "to", "alpha_dropout": "alpha_dropout",
}  # fmt: skip
_OPERATORS = ["eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "pow", "matmul", "neg", "abs"]
_OPERATORS += ["iadd", "isub", "imul", "itruediv", "ipow", "getitem", "setitem"]
# operators called as methods, which is how Dynamo before 2.13 writes some of them
ALIASES |= {f"__{name}__": ALIASES.get(name, name) for name in _OPERATORS}

# module -> (canonical name, attributes passed by keyword)
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Softmax: ("softmax", ("dim",)),
    nn.Softmin: ("softmin", ("dim",)),
    nn.LogSoftmax: ("log_softmax", ("dim",)),
    nn.Identity: ("identity", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.ReLU: ("relu", ()),
    nn.SiLU: ("silu", ()),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
    nn.Unflatten: ("unflatten", ("dim", "unflattened_size")),
    # opaque, but by name: which of their axes are features matters to `provenance.py` and `passing.py`
    nn.Conv1d: ("conv1d", ()),
    nn.Conv2d: ("conv2d", ()),
    nn.Conv3d: ("conv3d", ()),
    nn.BatchNorm1d: ("batch_norm", ()),
    nn.BatchNorm2d: ("batch_norm", ()),
    nn.GroupNorm: ("group_norm", ()),
    nn.LayerNorm: ("layer_norm", ()),
    nn.MaxPool2d: ("max_pool2d", ()),
    nn.AvgPool2d: ("avg_pool2d", ()),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ()),
    nn.ConvTranspose2d: ("conv_transpose2d", ()),
    nn.Embedding: ("embedding", ()),
    nn.Upsample: ("interpolate", ()),
    nn.PixelShuffle: ("pixel_shuffle", ()),
    nn.PixelUnshuffle: ("pixel_unshuffle", ()),
    nn.Unfold: ("unfold", ()),
    nn.GELU: ("gelu", ()),
    nn.ELU: ("elu", ()),
    nn.LeakyReLU: ("leaky_relu", ()),
    nn.Hardswish: ("hardswish", ()),
}

# torch's parameter names that differ between spellings
_PARAMETERS = {"self": "input", "axis": "dim", "x": "input", "tensor": "input"}


@dataclass(frozen=True)
class Call:
    """A node's call with its canonical name; `inplace` when it overwrites its first argument."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: bool = False


DTENSOR_CALLS = ("to_local", "from_local", "redistribute", "full_tensor")
MASKED = ("softmax", "log_softmax", "softmin")
"""Of `torch.masked`, where a row is that of the elements its mask has."""


@cache
def _functions() -> dict[Any, str]:
    """torch's own callables -> their canonical names."""
    table: dict[Any, str] = {getattr(torch.masked, name): f"masked_{name}" for name in MASKED}
    spaces: list[Any] = [torch, torch.nn.functional, torch.special, operator, torch._C._nn, torch.linalg, torch.Tensor]
    for space in spaces:
        for name in dir(space):
            if name.startswith("__"):  # operator.__add__ is operator.add
                continue
            target = getattr(space, name, None)
            if callable(target) and not isinstance(target, type):
                try:
                    table.setdefault(target, ALIASES.get(name, name))
                except TypeError:  # unhashable
                    continue
    return table


def canonical_name(target: Any) -> str | None:
    """The canonical name of one of torch's own callables, None for any other.  A packet is called as its overloads."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        whole = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = whole.partition("::")
        return ALIASES.get(name, name) if namespace in ("aten", "prims") else None
    try:
        return _functions().get(target) or _of_dtensor(target)
    except TypeError:  # unhashable
        return None


def _of_dtensor(target: Any) -> str | None:
    """What Dynamo before 2.13 writes for a call of DTensor: a function of its own with the method's name in its own."""
    if not str(getattr(target, "__module__", "")).startswith("torch._dynamo.variables."):
        return None
    kind, _, name = target.__name__.replace(" ", "_").partition("_")
    return name if kind == "prim" and name in DTENSOR_CALLS else None


@lru_cache(maxsize=512)
def _parameter_names(target: Callable[..., Any]) -> tuple[str, ...] | None:
    """The parameter names of a Python-level torch function, which may order them differently from ATen."""
    if not inspect.isfunction(target):
        return None
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(q.kind in (q.VAR_POSITIONAL, q.VAR_KEYWORD) for q in parameters):
        return None
    return tuple(q.name for q in parameters)


def read_call(node: fx.Node, modules: dict[str, nn.Module]) -> Call | None:
    """The canonical call a node makes, or None when its target is not in the table."""
    args, kwargs = tuple(node.args), dict(node.kwargs)
    if node.op == "call_module":
        return module_call(modules.get(str(node.target)), args, str(node.target))
    if node.op == "call_method":
        name = ALIASES.get(str(node.target), str(node.target))
    elif callable(node.target):
        known = canonical_name(node.target)
        if known is None:
            return None
        name = known
        names_or_none = _parameter_names(node.target)  # ATen's argument order is the function's
        if names_or_none is not None:
            kwargs = dict(zip(names_or_none, args, strict=False)) | kwargs
            args = ()
    else:
        return None
    kwargs = {_PARAMETERS.get(key, key): value for key, value in kwargs.items()}
    inplace = name.endswith("_") and not name.endswith("__")
    if inplace:
        name = ALIASES.get(name[:-1], name[:-1])
    if kwargs.pop("inplace", False):
        inplace = True
    return Call(name, args, kwargs, inplace)


def altered(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or a `forward` of its own."""
    return "forward" in vars(module) or any(getattr(module, kind) for kind in HOOKS)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def module_call(module: nn.Module | None, args: tuple[Any, ...], target: str) -> Call | None:
    """The canonical call that one of torch's modules makes; None where it is not in the table."""
    if module is None:
        return None
    inplace = bool(getattr(module, "inplace", False))
    if type(module) is nn.Dropout:
        return Call("dropout", args, {"p": module.p, "training": module.training, "module": target}, inplace)
    if type(module) in MODULES:
        name, attributes = MODULES[type(module)]
        return Call(name, args, {key: getattr(module, key) for key in attributes}, inplace)
    if type(module) is nn.Linear:
        return Call("module_linear", args, {"features": module.out_features, "bias": module.bias is not None})
    return Call(type(module).__name__, args, {}, inplace) if inplace else None
