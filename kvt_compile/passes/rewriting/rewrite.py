"""Decisions -> the graph, in place: one `kvt::` node per site, everything that only served the dense map removed.

softmax(0.125 * (q @ kT) + bias) @ v   ->   kvt.attention(q, k, v, [bias], "0.125*s + c0[h, i, j]", "p", k, ...)[0]
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from kvt_compile.kernels.op import ops as _ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.passes.canonical.modes import Mode
from kvt_compile.passes.canonical.values import Value, meta_value
from kvt_compile.passes.decide import Decision, share_of
from kvt_compile.passes.reading.grid import Placed
from kvt_compile.passes.rewriting.emit import Emitter
from kvt_compile.passes.rewriting.given import build_in
from kvt_compile.passes.rewriting.operands import emitter_for, queries_and_keys
from kvt_compile.passes.rewriting.writes import Writes
from kvt_compile.passes.selecting import Selected
from kvt_compile.passes.site import Fused, OwnK, ScoresKept, Thinned
from kvt_compile.select.geometry import needs_grid
from kvt_compile.select.text import parse
from kvt_compile.topk import TopK

aten = torch.ops.aten
OWN_K = "kvt_own_k"
"""In `meta["custom"]` of a node whose k is the model's own: that k, as text.  It is saved with a program."""
How = tuple[str, float]
"""The last arguments of a forward op: lowering, tolerance."""


class DropoutRate(nn.Module):
    """The dropout probability an `nn.Dropout` applies now: p while training, 0 in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self) -> float:
        return self.p if self.training else 0.0


def rewrite(
    gm: fx.GraphModule,
    decisions: Iterable[Decision],
    lowering: str = "auto",
    tolerance: float = 0.0,
    ranks: int = 1,
    entry: Mode | None = None,
) -> bool:
    """Rewrites every decided site of the graph in place and returns whether anything changed.

    The graph starts in mode `entry`.  It is linted before and after; a site whose decision has no k is not touched.
    """
    gm.graph.lint()
    renamed: dict[fx.Node, fx.Node] = {}
    writes = Writes(gm, entry or Mode())
    for decision in decisions:
        if decision.topk is None:
            continue
        plan = decision.site.plan
        how = lowering, 0.0 if decision.own else tolerance  # what the model does is not the user's to be lax about
        if isinstance(plan, Fused):
            new = _fuse(gm, plan, decision.topk, how, renamed, decision.select, ranks, entry or Mode(), writes)
        elif isinstance(plan, Thinned):
            new = _thin(gm.graph, plan, decision.topk, how, renamed, writes)
        else:
            new = _keep_scores(gm.graph, plan, decision.topk, how, renamed, writes)
        if decision.own:
            new.meta["custom"] = {**new.meta.get("custom", {}), OWN_K: str(decision.site.own)}
    if not renamed:
        return False
    gm.graph.lint()
    gm.recompile()
    return True


def _fuse(
    gm: fx.GraphModule,
    plan: Fused,
    topk: TopK | OwnK,
    how: How,
    renamed: dict[fx.Node, fx.Node],
    select: Selected | None,
    ranks: int,
    entry: Mode,
    writes: Writes,
) -> fx.Node:
    emit = emitter_for(gm.graph, plan, entry, renamed, writes)
    q, k = queries_and_keys(emit, plan)
    g = plan.groups
    v = emit.operand(plan.v, (g.batch, g.kv_heads, g.keys, g.value_features))
    captured = [emit.value(value) for value in plan.captured]
    score = plan.score
    if select is not None and select.functions is not None:
        score, tensors = build_in(gm, emit, select, q, k, score, len(captured))
        captured += tensors
    sizes = [emit.size(atoms) for atoms in plan.sizes]
    rate, seed = _dropout(gm, plan, emit, q)
    call = emit.call(
        torch.ops.kvt.attention.default, q, k, v, captured, score, plan.weight,
        _keys_to_keep(emit, topk, _times(emit, emit.size(g.keys), ranks)), sizes, rate, seed,
        *how, *_selection(select, emit),
    )  # fmt: skip
    out = emit.call(operator.getitem, call, 0)
    out = emit.arrange(out, (g.batch, (*g.kv_heads, *g.group), g.queries, g.value_features), plan.out)
    out = emit.like(out, plan.node)
    if writes.hands_out(plan.node):
        out = emit.call(aten.mul.Scalar, out, 1)  # a copy that Inductor keeps: it drops a clone at a graph's end
    elif writes.overwrites(plan.node, after=plan.node):
        out = emit.call(aten.clone.default, out)
    _replace(gm.graph, plan.node, out, renamed)
    _remove(gm.graph, plan)
    return call


def _selection(select: Selected | None, emit: Emitter) -> tuple[Any, ...]:
    """The last arguments of the node: it is no part of a larger call, then what it keeps and where its tokens stand."""
    if select is None or not select.text:
        return ()
    if (placed := select.placed) is not None:
        grid = _grid(placed, emit) if needs_grid(parse(select.text)) else None
        return None, select.text, grid, placed.prefix
    return None, *select.arguments


def _grid(placed: Placed, emit: Emitter) -> list[Any]:
    """Sizes of the map that the tokens were: numbers, or nodes that read them when the graph runs."""
    sizes = [(d, placed.value.shape[d]) for d in placed.dims]
    map_ = emit.value(placed.value)
    size_of = torch.ops.aten.sym_size.int
    return [size if isinstance(size, int) else emit.call(size_of, map_, d) for d, size in sizes]


def _dropout(gm: fx.GraphModule, plan: Fused, emit: Emitter, q: fx.Node) -> tuple[Any, Any]:
    if plan.dropout == 0.0:
        return 0.0, None
    rate: Any = plan.dropout
    if plan.dropout_module:  # a module that can still be switched between train and eval
        name = plan.dropout_module.replace(".", "_") + "_rate"
        if not hasattr(gm, name):
            module = gm.get_submodule(plan.dropout_module)
            gm.add_submodule(name, DropoutRate(plan.dropout).train(module.training))
        rate = emit.module(name, plan.dropout)
    # one int64 from torch's own generator, so that `torch.manual_seed` rules the dropout mask
    device = meta_value(q).device
    return rate, emit.call(aten.randint.low, 0, 1 << 62, [1], dtype=torch.int64, device=device)


def _times(emit: Emitter, size: Any, ranks: int) -> Any:
    """A size of all ranks together."""
    if isinstance(size, int):
        return size * ranks
    return size if ranks == 1 else emit.call(operator.mul, size, ranks)


def _keys_to_keep(emit: Emitter, topk: TopK | OwnK, keys: Any) -> Any:
    """k as an int, or as nodes that compute it when the number of keys is dynamic."""
    if isinstance(topk, OwnK):
        return _own_k(emit, topk, keys)
    share = share_of(topk)
    if share is None:
        return int(topk)  # the op clamps it to the number of keys
    if isinstance(keys, int):
        return max(-(-keys * share.numerator // share.denominator), 1)  # of no keys too: the op wants at least 1
    scaled = emit.call(operator.mul, keys, share.numerator)
    return emit.call(operator.floordiv, emit.call(operator.add, scaled, share.denominator - 1), share.denominator)


def _own_k(emit: Emitter, own: OwnK, keys: Any) -> Any:
    """number + node, or keys + number - node."""
    total: Any = keys if own.from_keys else own.number
    if own.from_keys and own.number:
        total = emit.call(operator.add, total, own.number)
    if own.node is None:
        return total
    node = emit.node(own.node)
    if own.minus:
        return emit.call(operator.sub, total, node)
    return node if total == 0 else emit.call(operator.add, node, total)


def _keep_scores(
    graph: fx.Graph, plan: ScoresKept, topk: TopK | OwnK, how: How, renamed: dict[fx.Node, fx.Node], writes: Writes
) -> fx.Node:
    emit = Emitter(graph, plan.node, plan.node, renamed, inference=writes.mode(plan.node).inference)
    scores = emit.value(plan.scores)
    size = plan.scores.shape[plan.dim]
    keys = size if isinstance(size, int) else emit.call(aten.sym_size.int, scores, plan.dim)
    dtype = meta_value(plan.node).dtype
    new = call = emit.call(
        torch.ops.kvt.topk_softmax.default, scores, plan.dim, _keys_to_keep(emit, topk, keys), dtype, *how
    )
    if plan.written or writes.overwrites(plan.node, after=plan.node):
        new = emit.call(aten.clone.default, new)
    new = emit.like(new, plan.node)
    _replace(graph, plan.node, new, renamed)
    graph.erase_node(plan.node)
    _erase(graph, plan.selection)
    return call


def _thin(
    graph: fx.Graph, plan: Thinned, topk: TopK | OwnK, how: How, renamed: dict[fx.Node, fx.Node], writes: Writes
) -> fx.Node:
    """w -> w where k-NN softmax of log w is not 0: the k largest of each row, and 0 elsewhere."""
    emit = Emitter(graph, plan.node.next, plan.node, renamed)
    weights = emit.node(plan.node)
    users = list(weights.users)
    size = plan.scores.shape[plan.dim]
    keys = size if isinstance(size, int) else emit.call(aten.sym_size.int, weights, plan.dim)
    dtype = torch.promote_types(meta_value(plan.node).dtype, torch.float32)  # half would make small weights 0
    inference = writes.mode(plan.node).inference
    fixed = weights if inference else emit.call(aten.detach.default, weights)
    logs = emit.call(aten.log.default, emit.call(aten.to.dtype, fixed, dtype))
    kept = emit.call(
        torch.ops.kvt.topk_softmax.default, logs, plan.dim, _keys_to_keep(emit, topk, keys), dtype, *how
    )  # fmt: skip
    new = emit.call(aten.masked_fill.Scalar, weights, emit.call(aten.eq.Scalar, kept, 0.0), 0.0)
    for user in users:
        user.replace_input_with(weights, new)
    renamed[weights] = new
    return kept


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, renamed: dict[fx.Node, fx.Node]) -> None:
    old.replace_all_uses_with(new)
    renamed[old] = new


def _remove(graph: fx.Graph, plan: Fused) -> None:
    """Erases the region and then whatever only fed it.

    The region was proved closed, so its in-place writes have no reader left either; outside it only operations known
    to be free of side effects go.
    """

    parent = plan.node.args[0] if plan.node.target is operator.getitem else None
    graph.erase_node(plan.node)
    if isinstance(parent, fx.Node):  # an operator that has other outputs, which nobody reads
        for node in [*parent.users, parent]:
            if not node.users:
                graph.erase_node(node)
    inside = {value.node for value in plan.interior}
    for node in [user for value in inside for user in value.users]:  # what `x[i] += y` ends with
        writes = node.target is operator.setitem and node not in inside and not node.users
        if writes and {node.args[0], node.args[2]} <= inside:
            graph.erase_node(node)
    for values in (plan.interior, _pure_feeders(plan.sources)):
        _erase(graph, values)


def _erase(graph: fx.Graph, values: Iterable[Value]) -> None:
    """The nodes of dead values that nobody reads, last first.  An input stays, read or not: callers still give it."""
    in_order = dict.fromkeys(value.node for value in sorted(values, key=lambda value: value.index))
    for node in reversed(in_order):
        if not node.users and not node._erased and node.op != "placeholder":
            graph.erase_node(node)


def _pure_feeders(sources: Iterable[Value]) -> set[Value]:
    """Values behind the region that only compute: pointwise and layout values no write has touched."""
    pure: set[Value] = set()
    queue = list(sources)
    seen: set[Value] = set()
    while queue:
        value = queue.pop()
        if value in seen or value.kind not in ("pointwise", "layout") or value.name == "dropout":
            continue
        seen.add(value)
        if value.holder is value.node and value.expired is None:
            pure.add(value)
        queue += value.operands
    return pure
