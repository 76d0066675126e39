"""fx.Graph -> [Value]: every node read through the table of spellings, in-place writes resolved into versions.

    attn = q @ kT;  attn += bias;  w = attn.softmax(-1)      (three nodes, one buffer)
      ->  v0 = contraction(q, kT);  v1 = add(v0, bias);  v2 = softmax(v1)

Where a node runs without grad, what it reads of what was computed with grad stands behind a "border", which is the
value detached: `with torch.no_grad(): w = softmax(q @ kT)` reads border(q) and border(k), and so does whoever fuses it.
What a write does to the memory it shares with others is in versions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical import (  # noqa: F401 - they fill the table of meanings
    meaning_contraction,
    meaning_pointwise,
    meaning_softmax,
)
from kvt_compile.passes.canonical.algebra.recognise import Recogniser
from kvt_compile.passes.canonical.handed import hands_on
from kvt_compile.passes.canonical.literals import literal_number
from kvt_compile.passes.canonical.meaning import MEANINGS, Builder, integer
from kvt_compile.passes.canonical.meaning_layout import index, select_of, slice_of
from kvt_compile.passes.canonical.meaning_pointwise import constant
from kvt_compile.passes.canonical.modes import Mode, modes_of
from kvt_compile.passes.canonical.spellings import Call, altered, module_call, read_call
from kvt_compile.passes.canonical.state import State, bind, builtin_call, lookup, opaque_value, shape_of
from kvt_compile.passes.canonical.values import Value, dim_of, meta_value
from kvt_compile.passes.canonical.versions import FORGOTTEN, mutates, store, write, write_item


@dataclass
class CanonicalGraph:
    """All values in program order; `outputs` are those somebody outside the graph sees."""

    values: list[Value]
    outputs: list[Value]
    modes: dict[fx.Node, Mode] = field(default_factory=dict)


def canonicalise(
    gm: fx.GraphModule, origins: dict[str, str] | None = None, entry: Mode | None = None
) -> CanonicalGraph:
    """Reads a graph into canonical values.

    Args:
        gm: a graph whose nodes carry fake values in `meta` (`example_value` or `val`).
        origins: node name -> "parameter" | "buffer" for placeholders, where the capture knows (export).
        entry: the mode the graph starts in, where it is not the usual one.
    """
    state = State(gm, dict(gm.named_modules()), origins or {})
    recogniser = Recogniser()
    modes = modes_of(gm.graph, entry or Mode())
    outputs: list[Value] = []
    for node in gm.graph.nodes:
        state.mode = modes[node]
        if node.op == "output":
            outputs = [state.env[n] for n in node.all_input_nodes if n in state.env]
        else:
            _read_node(state, node, recogniser)
    for value, border in state.borders.items():  # whoever holds a tensor can hand it on detached
        border.holder, border.expired = value.holder, value.expired
    graph = CanonicalGraph(state.values, [*outputs, *state.escaping], modes)
    forget_unused(graph)
    return graph


def forget_unused(graph: CanonicalGraph) -> None:
    """Drops users nobody reads, so that "who reads this value" means somebody really does."""
    kept = set(map(id, graph.outputs))
    for value in reversed(graph.values):
        value.users = [user for user in value.users if id(user) in kept]
        if value.users or _has_effects(value):
            kept.add(id(value))


def _has_effects(value: Value) -> bool:
    """Whether something happens that no value tells of.  What torch's own in-place operations write is a value."""
    if value.kind != "opaque" or value.name == FORGOTTEN or not value.node.is_impure():
        return False
    call = value.attrs.get("call")
    return not (isinstance(call, Call) and call.inplace)


def _read_node(state: State, node: fx.Node, recogniser: Recogniser) -> None:
    fake = meta_value(node)
    if node.op in ("placeholder", "get_attr"):
        if isinstance(fake, torch.Tensor):
            bind(state, node, _literal(state, node, fake) or _source(state, node, fake))
        return
    call = builtin_call(node) or read_call(node, state.modules)
    writes = mutates(node) or (call is not None and call.inplace)
    if not state.mode.records and not writes and hands_on(node, state.modules):
        state.mode = replace(state.mode, grad=True, inference=False)
    if state.mode.transforms:
        _transformed(state, node, fake, call)
        return
    if call is not None and call.name == "setitem":
        write_item(state, node)
        return
    if isinstance(fake, torch.SymFloat):
        _number(state, node, call)
        return
    if not isinstance(fake, torch.Tensor):
        if isinstance(fake, list | tuple) or call is None or call.inplace:
            _opaque(state, node, fake)
        return
    value = _meaning_of(state, node, call, fake) or opaque_value(state, node, fake)
    value = recogniser.look(Builder(node, shape_of(fake), fake.dtype, state.modules), value)
    if writes:
        write(state, node, value, call)
    else:
        bind(state, node, value)


def _transformed(state: State, node: fx.Node, fake: Any, call: Call | None) -> None:
    """Under torch.func what a capture left on a node is of a level that is gone: only its size is read."""
    value = opaque_value(state, node, fake)
    target = node.args[0] if call is not None and call.name == "setitem" else None
    if isinstance(target, fx.Node) and target in state.env:
        old = state.env[target]
        store(state, node, target, replace(value, shape=old.shape, dtype=old.dtype))
    elif (call is not None and call.inplace) or mutates(node):
        write(state, node, value, call)
    elif fake is not None:
        bind(state, node, value)


def _number(state: State, node: fx.Node, call: Call | None) -> None:
    """A float that is known only at run time, as Dynamo makes of `self.scale` once a second module has another one.

    What is computed of sizes alone is not followed: the graph itself computes it."""
    if call is None or not any(isinstance(state.env.get(x), Value) for x in node.all_input_nodes):
        return
    builder = Builder(node, (), torch.float64, state.modules)
    value = builder.call(call.name, lookup(state, call.args), lookup(state, call.kwargs))
    if value is not None and value.kind in ("pointwise", "layout"):
        state.hold(node, state.add(value))


def _literal(state: State, node: fx.Node, fake: torch.Tensor) -> Value | None:
    """A tensor of one number, as `torch.full` makes it."""
    number = literal_number(node, state.modules)
    return None if number is None else constant(Builder(node, shape_of(fake), fake.dtype, state.modules), number)


def _source(state: State, node: fx.Node, fake: torch.Tensor) -> Value:
    origin = state.origins.get(node.name, "")
    if not origin:
        if node.op == "get_attr":
            origin = "parameter" if isinstance(fake, torch.nn.Parameter) else "buffer"
        elif isinstance(fake, torch.nn.Parameter) or "_parameters_" in node.name:
            origin = "parameter"
        else:
            origin = "buffer" if "_buffers_" in node.name else "input"
    return Value("source", node.op, node, shape_of(fake), fake.dtype, origin=origin)  # type: ignore[arg-type]


def _meaning_of(state: State, node: fx.Node, call: Call | None, fake: torch.Tensor) -> Value | None:
    if call is None or (node.op == "call_module" and is_more_than_read(state.modules[str(node.target)])):
        return None
    builder = Builder(node, shape_of(fake), fake.dtype, state.modules)
    args, kwargs = lookup(state, call.args), lookup(state, call.kwargs)
    if call.name == "getitem":
        return _getitem(state, builder, node, args)
    return builder.call(call.name, args, kwargs)


def is_more_than_read(module: torch.nn.Module) -> bool:
    """Whether a call of the module would be read as the function its class stands for, and does more than that.  A
    linear layer stays where it is, whatever is read of it."""
    call = module_call(module, (), "")
    return call is not None and call.name in MEANINGS and call.name != "module_linear" and altered(module)


def _getitem(state: State, builder: Builder, node: fx.Node, args: tuple[Any, ...]) -> Value | None:
    source, item = args
    if isinstance(source, Value) and source.kind != "opaque":
        return index(builder, source, item)
    parent = node.args[0]
    if isinstance(source, Value) and isinstance(meta_value(source.node), torch.Tensor):
        return index(builder, source, item)
    if isinstance(parent, fx.Node) and isinstance(item, int):
        return _piece(state, builder, parent, item)
    return None


def _piece(state: State, builder: Builder, parent: fx.Node, item: int) -> Value | None:
    """unbind/split/chunk(x)[item] -> select or slice of x; max(x, dim)[0] -> amax."""
    call = read_call(parent, state.modules)
    if call is None:
        return None
    if call.name.startswith("_scaled_dot_product"):
        return _fused_attention(state, builder, parent, item)
    args, kwargs = lookup(state, call.args), lookup(state, call.kwargs)
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


def _fused_attention(state: State, builder: Builder, parent: fx.Node, item: int) -> Value | None:
    """The output of an operator that SDPA runs (`aten._scaled_dot_product_flash_attention_for_cpu`, ...), which have
    log-sum-exps, seeds or weights beside it: those must not be read."""
    schema = getattr(parent.target, "_schema", None)
    others = [user for user in parent.users if user is not builder.node and user.users]
    if item != 0 or schema is None or others or parent not in state.env:
        return None
    given = {x.name: y for x, y in zip(schema.arguments, parent.args, strict=False)} | dict(parent.kwargs)
    if given.get("dropout_mask") is not None or given.get("return_debug_mask"):
        return None
    q, k, v = (lookup(state, given.get(name)) for name in ("query", "key", "value"))
    mask = given.get("attn_mask", given.get("attn_bias"))
    options = {name: lookup(state, given[name]) for name in ("is_causal", "dropout_p", "scale", "enable_gqa")
               if given.get(name) is not None}  # fmt: skip
    found = builder.call("scaled_dot_product_attention", (q, k, v, lookup(state, mask)), options)
    if found is not None:
        state.env[parent].attrs["within"] = found
    return found


def _opaque(state: State, node: fx.Node, fake: Any) -> None:
    value = opaque_value(state, node, fake)
    if mutates(node):
        write(state, node, value, None)
    else:
        bind(state, node, value)
