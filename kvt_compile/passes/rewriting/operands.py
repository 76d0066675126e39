"""A site -> nodes for its queries and keys as its operator gets them."""

from __future__ import annotations

from torch import fx

from kvt_compile.passes.canonical.made import held
from kvt_compile.passes.canonical.modes import Mode
from kvt_compile.passes.rewriting.emit import Emitter
from kvt_compile.passes.rewriting.flags import needs_as_much_as
from kvt_compile.passes.rewriting.writes import Writes
from kvt_compile.passes.site import Fused


def emitter_for(
    graph: fx.Graph, plan: Fused, entry: Mode, renamed: dict[fx.Node, fx.Node], writes: Writes | None = None
) -> Emitter:
    """What writes nodes before the one that is replaced, and knows where the sizes of the site are.

    writes: what the graph writes to; None where what is written does not stay."""
    read = (plan.q.value, plan.k.value, plan.v.value, *plan.captured)
    viewed = needs_as_much_as(plan.node, entry) if any(x.kind == "border" for x in read) else frozenset()
    holders = {x.holder for value in read for x in held(value) if x.holder is not None}
    copied = frozenset(x for x in holders if writes and writes.overwrites(x, after=plan.node))
    inference = writes is not None and writes.mode(plan.node).inference
    emit = Emitter(graph, plan.node, plan.node, renamed, viewed, copied, inference)
    emit.know_sizes(plan.q, plan.k, plan.v)
    return emit


def queries_and_keys(emit: Emitter, plan: Fused) -> tuple[fx.Node, fx.Node]:
    """q `[B, Hq, Nq, D]` and k `[B, Hk, Nk, D]`."""
    g = plan.groups
    q = emit.operand(plan.q, (g.batch, (*g.kv_heads, *g.group), g.queries, g.features))
    return q, emit.operand(plan.k, (g.batch, g.kv_heads, g.keys, g.features))
