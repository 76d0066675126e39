"""What is known half-way through a graph: the value each node's tensor holds now, and which nodes share memory."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical.modes import Mode
from kvt_compile.passes.canonical.spellings import Call, read_call
from kvt_compile.passes.canonical.values import Value, dim_of, known_number, meta_value


@dataclass
class State:
    graph_module: fx.GraphModule
    modules: dict[str, torch.nn.Module]
    origins: dict[str, str]
    values: list[Value] = field(default_factory=list)
    env: dict[fx.Node, Value] = field(default_factory=dict)
    escaping: list[Value] = field(default_factory=list)
    storages: dict[int, list[fx.Node]] = field(default_factory=dict)
    mode: Mode = field(default_factory=Mode)
    """Of the node that is being read."""
    borders: dict[Value, Value] = field(default_factory=dict)

    def seen(self, value: Value) -> Value:
        """The value as the present node sees it: behind a border where nothing is recorded any more."""
        if self.mode.records or not value.attached:
            return value
        if value not in self.borders:
            self.borders[value] = Value("border", "detach", value.node, value.shape, value.dtype, (value,))
        return self.borders[value]

    def add(self, value: Value) -> Value:
        """Append a value and the values it was built from that are not listed yet.

        A node that leaves everything where it is, such as `x[:]`, is the value it reads, which is listed once."""
        if value.index >= 0:
            return value
        for operand in value.operands:
            if operand.index < 0:
                self.add(operand)
            operand.users.append(value)
        if not value.attached and (value.dtype is None or value.dtype.is_floating_point or value.dtype.is_complex):
            anew = value.name.startswith("new_") or value.name.endswith("_like")  # of another's size alone
            recorded = self.mode.records and not anew and any(operand.attached for operand in value.operands)
            value.attached = value.kind == "source" or (recorded and value.kind != "border")
        value.index = len(self.values)
        self.values.append(value)
        return value

    def hold(self, node: fx.Node, value: Value) -> None:
        """From here on the node's tensor is this version."""
        old = self.env.get(node)
        if old is not None and old is not value and old.holder is node:
            old.expired = len(self.values)
        self.env[node] = value
        if value.holder is None:
            value.holder = node


def builtin_call(node: fx.Node) -> Call | None:
    if node.op == "call_function" and node.target is operator.getitem:
        return Call("getitem", tuple(node.args), {})
    if node.op == "call_function" and node.target is getattr and len(node.args) >= 2:
        if node.args[1] in ("values", "indices") and isinstance(node.args[0], fx.Node):  # of torch.max(x, dim), say
            return Call("getitem", (node.args[0], int(node.args[1] == "indices")), {})
        return Call(str(node.args[1]), node.args[:1], {})
    return None


def shape_of(fake: torch.Tensor) -> tuple[Any, ...]:
    return tuple(dim_of(size) for size in fake.shape)


def lookup(state: State, argument: Any) -> Any:
    """Node arguments -> Values where they are tensors; scalars that are known become numbers."""
    if isinstance(argument, fx.Node):
        known = state.env.get(argument, known_number(meta_value(argument)))
        if isinstance(known, Value):
            return state.seen(known)
        return known if isinstance(known, bool | int | float) else argument
    if isinstance(argument, list):
        return [lookup(state, x) for x in argument]
    if type(argument) is tuple or isinstance(argument, fx.immutable_collections.immutable_list):
        return tuple(lookup(state, x) for x in argument)
    if isinstance(argument, dict):
        return {key: lookup(state, x) for key, x in argument.items()}
    return argument


def opaque_value(state: State, node: fx.Node, fake: Any) -> Value:
    given: dict[fx.Node, Value] = {}
    inputs: list[Value] = []

    def note(n: fx.Node) -> None:
        if n in state.env:
            given[n] = state.seen(state.env[n])
            inputs.append(given[n])

    fx.map_arg((node.args, node.kwargs), note)
    shape = shape_of(fake) if isinstance(fake, torch.Tensor) else ()
    name = getattr(node.target, "__name__", str(node.target))
    call = builtin_call(node) or read_call(node, state.modules)
    return Value(
        "opaque", call.name if call else name, node, shape, getattr(fake, "dtype", None), tuple(inputs),
        {"call": call, "given": given},
    )  # fmt: skip


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's tensor; fake tensors share it exactly when the real ones do."""
    fake = meta_value(node)
    return memory_of(fake) if isinstance(fake, torch.Tensor) else None


def memory_of(fake: torch.Tensor) -> int | None:
    try:
        return int(fake.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def same_place(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two fake tensors are the same part of the same memory.  (Dynamic sizes as expressions: to compare them
    themselves would decide them.)"""
    return x is y or (memory_of(x) is not None and memory_of(x) == memory_of(y) and _extent(x) == _extent(y))


def _extent(fake: torch.Tensor) -> tuple[Any, ...]:
    return (fake.dtype, dim_of(fake.storage_offset()), shape_of(fake), tuple(dim_of(x) for x in fake.stride()))


def bind(state: State, node: fx.Node, value: Value) -> None:
    state.hold(node, state.add(value))
    storage = storage_of(node)
    if storage is not None:
        state.storages.setdefault(storage, []).append(node)
