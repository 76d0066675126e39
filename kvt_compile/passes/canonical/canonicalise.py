"""fx.Graph -> [Value]: every node read through the table of spellings, in-place writes resolved into versions.

    attn = q @ kT;  attn += bias;  w = attn.softmax(-1)      (three nodes, one buffer)
      ->  v0 = contraction(q, kT);  v1 = add(v0, bias);  v2 = softmax(v1)

A write to a view is a write to what it views and to every other view of it.  `_Memory` keeps, per storage, how its
nodes are views of one another, and gives each of them its new version after a write.  Where the relation cannot be
expressed the new version is opaque: nothing can be read through it, so nothing can be read wrongly.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical import meaning_contraction as _contraction  # noqa: F401 - fills the table of meanings
from kvt_compile.passes.canonical.meaning import Builder, integer
from kvt_compile.passes.canonical.meaning_layout import index, select_of, slice_of
from kvt_compile.passes.canonical.spellings import Call, read_call
from kvt_compile.passes.canonical.values import Value, dim_of, meta_value


@dataclass
class CanonicalGraph:
    """All values in program order; `outputs` are those somebody outside the graph sees."""

    values: list[Value]
    outputs: list[Value]


@dataclass
class _State:
    graph_module: fx.GraphModule
    modules: dict[str, torch.nn.Module]
    origins: dict[str, str]
    values: list[Value] = field(default_factory=list)
    env: dict[fx.Node, Value] = field(default_factory=dict)
    escaping: list[Value] = field(default_factory=list)
    storages: dict[int, list[fx.Node]] = field(default_factory=dict)

    def add(self, value: Value) -> Value:
        """Append a value and the values it was built from that are not listed yet."""
        for operand in value.operands:
            if operand.index < 0:
                self.add(operand)
            operand.users.append(value)
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


def canonicalise(gm: fx.GraphModule, origins: dict[str, str] | None = None) -> CanonicalGraph:
    """Reads a graph into canonical values.

    Args:
        gm: a graph whose nodes carry fake values in `meta` (`example_value` or `val`).
        origins: node name -> "parameter" | "buffer" for placeholders, where the capture knows (export).
    """
    state = _State(gm, dict(gm.named_modules()), origins or {})
    outputs: list[Value] = []
    for node in gm.graph.nodes:
        if node.op == "output":
            outputs = [state.env[n] for n in node.all_input_nodes if n in state.env]
        else:
            _read_node(state, node)
    graph = CanonicalGraph(state.values, [*outputs, *state.escaping])
    _forget_unused(graph)
    return graph


def _forget_unused(graph: CanonicalGraph) -> None:
    """Drops users nobody reads, so that "who reads this value" means somebody really does."""
    kept = set(map(id, graph.outputs))
    for value in reversed(graph.values):
        value.users = [user for user in value.users if id(user) in kept]
        if value.users or (value.kind == "opaque" and value.name != _FORGOTTEN and value.node.is_impure()):
            kept.add(id(value))


def _read_node(state: _State, node: fx.Node) -> None:
    fake = meta_value(node)
    if node.op in ("placeholder", "get_attr"):
        if isinstance(fake, torch.Tensor):
            _bind(state, node, _source(state, node, fake))
        return
    call = _builtin_call(node) or read_call(node, state.modules)
    if call is not None and call.name == "setitem":
        _setitem(state, node)
        return
    if isinstance(fake, torch.SymFloat):
        _number(state, node, call)
        return
    if not isinstance(fake, torch.Tensor):
        if isinstance(fake, list | tuple) or call is None or call.inplace:
            _opaque(state, node, fake)
        return
    value = _meaning_of(state, node, call, fake) or _opaque_value(state, node, fake)
    if (call is not None and call.inplace) or _mutates(node):
        _write(state, node, value, call)
    else:
        _bind(state, node, value)


def _number(state: _State, node: fx.Node, call: Call | None) -> None:
    """A float that is known only at run time, as Dynamo makes of `self.scale` once a second module has another one."""
    if call is None:
        return
    builder = Builder(node, (), torch.float64, state.modules)
    value = builder.call(call.name, _lookup(state, call.args), _lookup(state, call.kwargs))
    if value is not None and value.kind in ("pointwise", "layout"):
        state.hold(node, state.add(value))


def _builtin_call(node: fx.Node) -> Call | None:
    if node.op == "call_function" and node.target is operator.getitem:
        return Call("getitem", tuple(node.args), {})
    if node.op == "call_function" and node.target is getattr and len(node.args) >= 2:
        if node.args[1] == "values" and isinstance(node.args[0], fx.Node):  # of torch.max(x, dim), say
            return Call("getitem", (node.args[0], 0), {})
        return Call(str(node.args[1]), node.args[:1], {})
    return None


def _source(state: _State, node: fx.Node, fake: torch.Tensor) -> Value:
    origin = state.origins.get(node.name, "")
    if not origin:
        if node.op == "get_attr":
            origin = "parameter" if isinstance(fake, torch.nn.Parameter) else "buffer"
        elif isinstance(fake, torch.nn.Parameter) or "_parameters_" in node.name:
            origin = "parameter"
        else:
            origin = "buffer" if "_buffers_" in node.name else "input"
    return Value("source", node.op, node, _shape(fake), fake.dtype, origin=origin)  # type: ignore[arg-type]


def _shape(fake: torch.Tensor) -> tuple[Any, ...]:
    return tuple(dim_of(size) for size in fake.shape)


def _lookup(state: _State, argument: Any) -> Any:
    """Node arguments -> Values where they are tensors; scalars that are known become numbers."""
    if isinstance(argument, fx.Node):
        known = state.env.get(argument, meta_value(argument))
        return known if isinstance(known, Value | bool | int | float) else argument
    if isinstance(argument, list):
        return [_lookup(state, x) for x in argument]
    if type(argument) is tuple or isinstance(argument, fx.immutable_collections.immutable_list):
        return tuple(_lookup(state, x) for x in argument)
    if isinstance(argument, dict):
        return {key: _lookup(state, x) for key, x in argument.items()}
    return argument


def _meaning_of(state: _State, node: fx.Node, call: Call | None, fake: torch.Tensor) -> Value | None:
    if call is None:
        return None
    builder = Builder(node, _shape(fake), fake.dtype, state.modules)
    args, kwargs = _lookup(state, call.args), _lookup(state, call.kwargs)
    if call.name == "getitem":
        return _getitem(state, builder, node, args)
    return builder.call(call.name, args, kwargs)


def _getitem(state: _State, builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> Value | None:
    source, item = args
    if isinstance(source, Value) and source.kind != "opaque":
        return index(builder, source, item)
    parent = node.args[0]
    if isinstance(source, Value) and isinstance(meta_value(source.node), torch.Tensor):
        return index(builder, source, item)
    if isinstance(parent, fx.Node) and isinstance(item, int):
        return _piece(state, builder, parent, item)
    return None


def _piece(state: _State, builder: Builder, parent: fx.Node, item: int) -> Value | None:
    """unbind/split/chunk(x)[item] -> select or slice of x; max(x, dim)[0] -> amax."""
    call = read_call(parent, state.modules)
    if call is None:
        return None
    args, kwargs = _lookup(state, call.args), _lookup(state, call.kwargs)
    x = args[0] if args else kwargs.get("input")
    pieces = meta_value(parent)
    if not isinstance(x, Value) or not isinstance(pieces, list | tuple):
        return None
    positions = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2, "max": 1}
    if call.name not in positions:
        return None
    at = positions[call.name]
    raw = kwargs.get("dim", args[at] if len(args) > at else (None if call.name == "max" else 0))
    dim = integer(raw)
    if dim is None:
        return None
    dim %= len(x.shape)
    item %= len(pieces)
    if call.name == "max":
        keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        return builder.value("reduce", "amax", (x,), dims=(dim,), keepdim=keepdim) if item == 0 else None
    if call.name == "unbind":
        return select_of(builder, x, dim, item)
    sizes = [dim_of(piece.shape[dim]) for piece in pieces]
    start = sum(size for size in sizes[:item] if isinstance(size, int))
    if not all(isinstance(size, int) for size in sizes[:item]):
        return None
    return slice_of(builder, x, dim, start, sizes[item])


def _opaque_value(state: _State, node: fx.Node, fake: Any) -> Value:
    inputs: list[Value] = []
    fx.map_arg((node.args, node.kwargs), lambda n: inputs.append(state.env[n]) if n in state.env else None)
    shape = _shape(fake) if isinstance(fake, torch.Tensor) else ()
    name = getattr(node.target, "__name__", str(node.target))
    call = _builtin_call(node) or read_call(node, state.modules)
    return Value(
        "opaque", call.name if call else name, node, shape, getattr(fake, "dtype", None), tuple(inputs),
        {"call": call},
    )  # fmt: skip


def _opaque(state: _State, node: fx.Node, fake: Any) -> None:
    value = _opaque_value(state, node, fake)
    if _mutates(node):
        _write(state, node, value, None)
    else:
        _bind(state, node, value)


# ---- writes --------------------------------------------------------------------------------------------------------


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's tensor; fake tensors share it exactly when the real ones do."""
    fake = meta_value(node)
    if not isinstance(fake, torch.Tensor):
        return None
    try:
        return int(fake.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def _bind(state: _State, node: fx.Node, value: Value) -> None:
    state.hold(node, state.add(value))
    storage = storage_of(node)
    if storage is not None:
        state.storages.setdefault(storage, []).append(node)


def _mutates(node: fx.Node) -> bool:
    """Whether an operation outside the table writes to one of its arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("out") is not None or node.kwargs.get("inplace")) or (
        node.op == "call_function"
        and name.endswith("_")
        and not name.endswith("__")
        and name not in ("and_", "or_", "not_")  # of the operator module: named so because the words are taken
    )


def _setitem(state: _State, node: fx.Node) -> None:
    target_node, items, written = node.args
    assert isinstance(target_node, fx.Node)
    if _is_there_already(target_node, items, written):
        return
    target = state.env[target_node]
    builder = Builder(node, target.shape, target.dtype, state.modules)
    where, source = _lookup(state, items), _lookup(state, written)
    view = index(builder, target, where)
    new = _masked(target, where, source, builder) if view is None else _scatter(target, view, source, builder)
    _store(state, node, target_node, new or _opaque_value(state, node, meta_value(target_node)))


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
    view, source = meta_value(target)[where], meta_value(written)
    same_place = view.untyped_storage()._cdata == source.untyped_storage()._cdata
    return bool(same_place and _extent(view) == _extent(source))


def _extent(x: torch.Tensor) -> tuple[Any, ...]:
    return (x.dtype, x.storage_offset(), tuple(x.shape), tuple(x.stride()))


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
    if step.name == "slice" and step.attrs["step"] == 1:
        attrs = {"dim": step.attrs["dim"], "start": step.attrs["start"], "size": step.shape[step.attrs["dim"]]}
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


def _write(state: _State, node: fx.Node, value: Value, call: Call | None) -> None:
    """An in-place operation: its first tensor argument takes the new version (and the node's result is that tensor)."""
    target = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(target, fx.Node) or target not in state.env:
        _bind(state, node, value)
        return
    _store(state, node, target, value)
    if isinstance(meta_value(node), torch.Tensor):
        state.hold(node, state.env[target])
        state.storages.setdefault(storage_of(node) or -1, []).append(node)


def _store(state: _State, node: fx.Node, target: fx.Node, new: Value) -> None:
    """Gives the written node, what it views and every other view of that their new versions."""
    old = state.env[target]
    storage = storage_of(target)
    group = [n for n in state.storages.get(storage, []) if n in state.env] if storage is not None else []
    before = {n: state.env[n] for n in group}
    new = state.add(new)
    versions: dict[Value, Value] = {old: new}
    builder = Builder(node, old.shape, old.dtype, state.modules)
    # up: from the written view to the tensor it views, until the storage's first node
    child, child_new = old, new
    while child.kind == "layout" and any(child.inputs[0] is v or child.inputs[0].node is child.node for v in before.values()):
        parent = child.inputs[0]  # held by a node, or one of several steps a node takes (x[1:, 1:])
        updated = _put(parent, [child], child_new, replace(builder, shape=parent.shape, dtype=parent.dtype))
        if updated is None:
            updated = _forgotten(node, parent)
        versions[parent] = state.add(updated)
        child, child_new = parent, versions[parent]
    # down: every other node of the storage is a view of something that changed
    for other in group:
        state.hold(other, _renewed(state, before[other], versions, node))
        if other.op in ("placeholder", "get_attr"):  # written memory of the caller: visible outside
            state.escaping.append(state.env[other])
    state.hold(target, new)


def _renewed(state: _State, value: Value, versions: dict[Value, Value], node: fx.Node) -> Value:
    if value in versions:
        return versions[value]
    if value.kind == "layout" or (value.kind == "pointwise" and value.name == "identity"):
        parent = _renewed(state, value.inputs[0], versions, node)
        if parent.name != _FORGOTTEN:
            again = replace(value, inputs=(parent,), users=[], index=-1, node=node, holder=None, expired=None)
            versions[value] = state.add(again)
            return again
    versions[value] = state.add(_forgotten(node, value))
    return versions[value]


_FORGOTTEN = "overwritten"


def _forgotten(node: fx.Node, value: Value) -> Value:
    """A tensor whose new content is not expressible: opaque, so that whoever reads it is refused."""
    return Value("opaque", _FORGOTTEN, node, value.shape, value.dtype, (value,))
