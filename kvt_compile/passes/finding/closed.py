"""A region between two products -> the proof that it can be replaced: nobody outside reads it, all of it was read."""

from __future__ import annotations

import functools
import operator

import networkx as nx

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.made import held
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.miss import Miss
from kvt_compile.passes.reading.axes import is_pointwise
from kvt_compile.passes.reading.facts import Facts


def closed_interior(
    graph: CanonicalGraph,
    first: Value,
    last: Value,
    read: set[Value],
    leaves: list[Value],
    beside: frozenset[Value] = frozenset(),
) -> frozenset[Value]:
    """The values on a way from `first` to `last`.  Raises Miss unless all were read and nobody else reads them, and
    every leaf still holds the same version when `last` runs.

    `beside` is what other sites read of the same softmax, and replace too: it may read what nothing is written to."""
    region: nx.DiGraph = nx.DiGraph()
    region.add_node(first)
    for value in graph.values[first.index : last.index + 1]:
        region.add_node(value)
        region.add_edges_from((x, value) for x in value.operands if x.index >= first.index)
    interior = (nx.descendants(region, first) & nx.ancestors(region, last)) | {first}
    outputs = set(graph.outputs)
    written = any(value.expired is not None for value in interior)
    for value in sorted(interior, key=lambda v: v.index):
        if value not in read:
            raise Miss("closed", value, f"the values or a bias are computed from the scores by {value.node.name}")
        outside = [user for user in value.users if user not in interior and user is not last]
        if beside.issuperset(outside) and not written:
            outside = []
        if outside or value in outputs:
            reader = outside[0].node.name if outside else "the model's output"
            raise Miss("closed", value, f"{value.node.name} is also read by {reader}")
    erased = {value.node for value in interior}
    for leaf in (x for captured in leaves for x in held(captured)):
        if (
            leaf in interior or leaf in beside
        ):  # N x N numbers beside the kernel, and in-place writes they need would be erased with the rest
            raise Miss("closed", leaf, f"{leaf.node.name} is made of the scores and is read beside them")
        if leaf.expired is not None and leaf.expired <= last.index:
            raise Miss("closed", leaf, f"{leaf.node.name} is overwritten before the product with the values")
        if leaf.holder is not leaf.node and leaf.node in erased:  # held by what a write of the region wrote to
            raise Miss("closed", leaf, f"{leaf.node.name} writes to the scores what the scores are made of")
    return frozenset(interior | _left_over(graph, first, last))


def unfed(graph: CanonicalGraph, facts: Facts, last: Value, leaves: list[Value]) -> Value | None:
    """A source that a backward from `last` reaches, by a way that none of what is read takes: rows that were written
    to, concatenated or stacked, of which the region reads others.  Its gradient is zeros in the model, not None."""
    left = facts.feeds[last] & ~functools.reduce(operator.or_, (facts.feeds[x] for x in leaves), 0)
    return next((x for x in graph.values if left >> x.index & 1), None) if left else None


_PURE = ("detach", "any", "all")
"""Operations that have no meaning as scores and do nothing but compute; pointwise ones torch knows itself."""


def _left_over(graph: CanonicalGraph, first: Value, last: Value) -> set[Value]:
    """What was computed of the scores as well and is read by nobody any more: a sum that became part of a softmax."""
    made: set[Value] = {first}
    for value in graph.values[first.index + 1 : last.index + 1]:
        known = value.kind not in ("opaque", "source") or value.name in _PURE or is_pointwise(value.name)
        nodes = {x.node for x in made}  # zeros_like(weights) has no operand, and reads the weights' node
        if known and (any(x in made for x in value.operands) or not nodes.isdisjoint(value.node.all_input_nodes)):
            made.add(value)
    return {value for value in made if not value.users and value is not last and value not in graph.outputs}
