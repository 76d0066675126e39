"""A write to a tensor -> the new version of it and of everything that shares its memory.

    v = scores[:, 1:];  v += 1      ->  v1 = add(v0, 1);  scores1 = scores0 with v1 in the place of its view

A write to a view is a write to what it views and to every other view of it.  The state lists, per storage, the nodes
whose tensors lie in it; after a write each of them gets its new version.  Where the relation cannot be
expressed the new version is opaque: nothing can be read through it, so nothing can be read wrongly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical.meaning import Builder
from kvt_compile.passes.canonical.meaning_layout import index
from kvt_compile.passes.canonical.spellings import Call
from kvt_compile.passes.canonical.state import State, bind, lookup, opaque_value, same_place, storage_of
from kvt_compile.passes.canonical.values import Value, meta_value


def mutates(node: fx.Node) -> bool:
    """Whether an operation outside the table writes to one of its arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):  # which overload it runs is not known
        return any(_may_run(getattr(node.target, name)._schema, node) for name in node.target.overloads())
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("out") is not None or node.kwargs.get("inplace")) or (
        node.op == "call_function"
        and name.endswith("_")
        and not name.endswith("__")
        and name not in ("and_", "or_", "not_")  # of the operator module: named so because the words are taken
    )


def _may_run(schema: Any, node: fx.Node) -> bool:
    """Whether it is an overload that writes, to arguments that the call has."""
    return schema.is_mutable and any(
        x.alias_info is not None and x.alias_info.is_write and (not x.kwarg_only or x.name in node.kwargs)
        for x in schema.arguments
    )


def write_item(state: State, node: fx.Node) -> None:
    target_node, items, written = node.args
    assert isinstance(target_node, fx.Node)
    if _is_there_already(target_node, items, written):
        return
    target = state.env[target_node]
    builder = Builder(node, target.shape, target.dtype, state.modules)
    where, source = lookup(state, items), lookup(state, written)
    view = index(builder, target, where)
    new = _masked(target, where, source, builder) if view is None else _scatter(target, view, source, builder)
    store(state, node, target_node, new or opaque_value(state, node, meta_value(target_node)), over=True)


def _masked(target: Value, items: Any, written: Any, builder: Builder) -> Value | None:
    """x[..., mask, :] = one number: where(mask, number, x)."""
    listed = list(items) if isinstance(items, tuple) else [items]
    masks = [item for item in listed if isinstance(item, Value)]
    whole = [item for item in listed if item is Ellipsis or item == slice(None)]
    if len(masks) != 1 or len(masks) + len(whole) != len(listed) or masks[0].dtype is not torch.bool:
        return None
    if isinstance(written, Value) and written.shape:
        return None
    mask, at = masks[0], listed.index(masks[0])
    missing = len(target.shape) - len(mask.shape)
    first = missing - (len(listed) - at - 1) if Ellipsis in listed[:at] else at
    if first < 0 or mask.shape != target.shape[first : first + len(mask.shape)]:
        return None
    if first < missing:
        mask = builder.layout("reshape", mask, mask.shape + (1,) * (missing - first))
    return builder.call("masked_fill", (target, mask, written), {})


def _is_there_already(target: fx.Node, items: Any, written: Any) -> bool:
    """`x[i] += y` ends with writing to x[i] what x[i] holds."""
    if not isinstance(written, fx.Node) or storage_of(written) is None or storage_of(written) != storage_of(target):
        return False
    where = fx.map_arg(items, meta_value)
    if any(isinstance(item, torch.Tensor) for item in (where if isinstance(where, tuple) else (where,))):
        return False  # reading at positions known only at run time copies
    return same_place(meta_value(target)[where], meta_value(written))


def _scatter(target: Value, view: Value, written: Any, builder: Builder) -> Value | None:
    """target with `written` in the place of one of its views, or None when the view is not made of slices."""
    steps: list[Value] = []
    current = view
    while current is not target:
        if current.kind != "layout":
            return None
        steps.append(current)
        current = current.inputs[0]
    if isinstance(written, Value):
        if len(written.shape) > len(view.shape):
            return None
        written = builder.layout("expand", written, view.shape) if written.shape != view.shape else written
    elif not isinstance(written, int | float):
        return None
    else:  # a constant has no coordinates: nothing to undo
        return _put(target, [s for s in reversed(steps)], written, builder)
    return _put(target, list(reversed(steps)), written, builder)


def _put(base: Value, steps: list[Value], written: Any, builder: Builder) -> Value | None:
    """Walks from the base to the written view, undoing each step on the way back."""
    if not steps:
        return written if isinstance(written, Value) else None
    step, rest = steps[0], steps[1:]
    inner = _put(step, rest, written, builder) if rest else written
    if inner is None:
        return None
    if step.name == "slice" and base.attached and step.shape == base.shape:
        return inner if isinstance(inner, Value) else None
    if step.name == "slice":
        attrs = {"dim": step.attrs["dim"], "start": step.attrs["start"], "size": step.shape[step.attrs["dim"]]}
        if step.attrs["step"] != 1:
            attrs["step"] = step.attrs["step"]
    elif step.name == "select":
        attrs = {"dim": step.attrs["dim"], "start": step.attrs["index"], "size": 1}
        if isinstance(inner, Value):
            dim = step.attrs["dim"]
            inner = builder.layout("reshape", inner, (*inner.shape[:dim], 1, *inner.shape[dim:]))
    elif step.name in ("permute", "reshape") and isinstance(inner, Value):
        if step.name == "reshape":
            return builder.layout("reshape", inner, base.shape)
        inverse = [0] * len(step.attrs["dims"])
        for position, dim in enumerate(step.attrs["dims"]):
            inverse[dim] = position
        return builder.layout("permute", inner, base.shape, dims=tuple(inverse))
    else:
        return None
    return Value("select_by", "put", builder.node, base.shape, base.dtype, (base, inner), attrs)


def write(state: State, node: fx.Node, value: Value, call: Call | None) -> None:
    """An in-place operation: its first tensor argument takes the new version (and the node's result is that tensor).
    An operation outside the table writes to whatever its schema says."""
    if call is None and isinstance(node.target, torch._ops.OpOverload):
        _write_by_schema(state, node, value)
        return
    target = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(target, fx.Node) or target not in state.env:
        bind(state, node, value)
        return
    if not _copies_itself(target, node, call):
        store(state, node, target, value, over=call is not None and call.name in ("zero", "fill", "copy"))
    if isinstance(meta_value(node), torch.Tensor):
        state.hold(node, state.env[target])
        state.storages.setdefault(storage_of(node) or -1, []).append(node)


def _copies_itself(target: fx.Node, node: fx.Node, call: Call | None) -> bool:
    """`x[i] += y` of a program ends with copying to x[i] what x[i] holds."""
    source = node.args[1] if call is not None and call.name == "copy" and len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or storage_of(source) is None or storage_of(source) != storage_of(target):
        return False
    return same_place(meta_value(target), meta_value(source))


def _write_by_schema(state: State, node: fx.Node, value: Value) -> None:
    bind(state, node, value)
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for target in given if isinstance(given, list | tuple) else (given,):
            if isinstance(target, fx.Node) and target in state.env:
                store(state, node, target, _written(node, state.env[target], value))


def store(state: State, node: fx.Node, target: fx.Node, new: Value, over: bool = False) -> None:
    """Gives the written node, what it views and every other view of that their new versions.  `over`: the operation
    reads nothing of what was there."""
    old = state.env[target]
    storage = storage_of(target)
    group = [n for n in state.storages.get(storage, []) if n in state.env] if storage is not None else []
    before = {n: state.env[n] for n in group}
    if old.attached and not state.mode.records:
        # autograd goes on as if nothing had been written, which no expression says
        new = Value("opaque", "write without grad", node, old.shape, old.dtype, (state.seen(old),), attached=True)
    elif over and old.attached and not _stays(old) and not _keeps(new, old):
        # zero_, copy_: nothing is left of what was there, and yet it has a gradient, of zeros
        new = Value("opaque", "written over", node, old.shape, old.dtype, (old, *new.operands), attached=True)
    new = state.add(new)
    versions: dict[Value, Value] = {old: new}
    builder = Builder(node, old.shape, old.dtype, state.modules)
    # up: from the written view to the tensor it views, until the storage's first node
    child, child_new = old, new
    while child.kind == "layout" and any(
        child.inputs[0] is v or child.inputs[0].node is child.node for v in before.values()
    ):
        parent = child.inputs[0]  # held by a node, or one of several steps a node takes (x[1:, 1:])
        updated = _put(parent, [child], child_new, replace(builder, shape=parent.shape, dtype=parent.dtype))
        if updated is None:
            updated = _forgotten(node, parent, new)
        versions[parent] = state.add(updated)
        child, child_new = parent, versions[parent]
    # down: every other node of the storage is a view of something that changed
    for other in group:
        state.hold(other, _renewed(state, before[other], versions, node, new))
        if other.op in ("placeholder", "get_attr"):  # written memory of the caller: visible outside
            state.escaping.append(state.env[other])
    state.hold(target, new)


def _keeps(new: Value, old: Value) -> bool:
    """Whether what is written is made of what was there."""
    queue, seen = [new], {new}
    while queue:
        here = queue.pop()
        if here is old:
            return True
        if here.index < 0 or here.index > old.index:
            queue += [x for x in here.operands if x not in seen]
            seen.update(here.operands)
    return False


def _stays(value: Value) -> bool:
    """Whether something is there after it was written over: the rest of the tensor that it is part of; or the value
    is an input or a view of one, which torch lets nobody write to that has a gradient."""
    while value.kind == "layout":
        if value.name in ("slice", "select") and value.shape != value.inputs[0].shape:
            return True
        value = value.inputs[0]
    return value.kind == "source"


def _renewed(state: State, value: Value, versions: dict[Value, Value], node: fx.Node, written: Value) -> Value:
    if value in versions:
        return versions[value]
    if value.kind == "layout" or (value.kind == "pointwise" and value.name == "identity"):
        parent = _renewed(state, value.inputs[0], versions, node, written)
        if parent.name != FORGOTTEN:
            again = replace(value, inputs=(parent,), users=[], index=-1, node=node, holder=None, expired=None)
            versions[value] = state.add(again)
            return again
    versions[value] = state.add(_forgotten(node, value, written))
    return versions[value]


def _written(node: fx.Node, old: Value, value: Value) -> Value:
    """What an operation that is not understood leaves in a tensor: made of all that it read."""
    return Value("opaque", value.name, node, old.shape, old.dtype, value.inputs, dict(value.attrs))


FORGOTTEN = "overwritten"


def _forgotten(node: fx.Node, value: Value, written: Value) -> Value:
    """A tensor whose new content is not expressible: opaque, so that whoever reads it is refused.  It is made of what
    was written to it: who reads it, or has it afterwards, has seen that."""
    return Value("opaque", FORGOTTEN, node, value.shape, value.dtype, (value, written))
