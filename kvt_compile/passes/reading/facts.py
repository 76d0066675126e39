"""What one sweep over the canonical graph tells about every value (linear in the graph).

activation    depends on a graph input            raw     a parameter, at most rearranged
carries       a pointwise/layout way leads here from a product of two computed tensors, so it may be scores
widely        the same, also through operations that mix axes (a linear map over heads, a convolution)
asked         a pointwise/layout way leads here from a product of a computed tensor with a raw one: learned queries, if
              what was computed are the keys
cost          elements that must be kept to compute it again from what is kept, where that is cheap
feeds         which sources a backward from here reaches, one bit for each
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.reading.exact import is_exact
from kvt_compile.passes.reading.read import numel

_THROUGH = frozenset({"pointwise", "layout", "select_by"})


@dataclass
class Facts:
    activation: set[Value] = field(default_factory=set)
    computed: set[Value] = field(default_factory=set)
    raw: set[Value] = field(default_factory=set)
    carries: set[Value] = field(default_factory=set)
    widely: set[Value] = field(default_factory=set)
    asked: set[Value] = field(default_factory=set)
    cost: dict[Value, float] = field(default_factory=dict)
    work: dict[Value, int] = field(default_factory=dict)
    """Pointwise operations per element that computing it again takes."""
    feeds: dict[Value, int] = field(default_factory=dict)


def gather_facts(graph: CanonicalGraph) -> Facts:
    facts = Facts()
    for value in graph.values:
        operands = list(value.operands)
        size = numel(value)
        facts.feeds[value] = _feeds(value, operands, facts)
        if value.kind == "source":
            if value.origin == "input":
                facts.activation.add(value)
                facts.computed.add(value)
            else:
                facts.raw.add(value)
            facts.cost[value], facts.work[value] = size, 0
            continue
        if any(x in facts.activation for x in operands):
            facts.activation.add(value)
        if value in facts.activation or value.kind == "contraction" or any(x in facts.computed for x in operands):
            facts.computed.add(value)
        if _is_raw(value, operands, facts):
            facts.raw.add(value)
        if value.kind == "contraction":
            sides = [n for n, x in enumerate(value.inputs) if x in facts.raw or _is_weight(value, x, facts)]
            value.attrs["mixing"] = bool(sides)
            value.attrs["raw_side"] = sides[-1] if sides else None
        if value.kind == "contraction" and not value.attrs["mixing"]:
            facts.carries.add(value)
            facts.widely.add(value)
        elif value.kind != "sdpa":
            for carried in (facts.carries, facts.asked):
                if value.kind in _THROUGH and any(x in carried for x in operands):
                    carried.add(value)
            if value.kind == "contraction" and may_ask(value):
                facts.asked.add(value)
            if any(x in facts.widely for x in operands):
                facts.widely.add(value)
        facts.cost[value] = _cost(value, operands, size, facts)
    return facts


def _feeds(value: Value, operands: list[Value], facts: Facts) -> int:
    if not value.attached:
        return 0
    own = 1 << value.index if value.kind == "source" else 0
    return functools.reduce(operator.or_, (facts.feeds[x] for x in operands), own)


def may_ask(value: Value) -> bool:
    """Whether a product with a parameter may be one with learned queries: it is not spelled as a layer is."""
    return bool(value.attrs["mixing"]) and value.name in ("matmul", "einsum")


_LAYERS = frozenset({"linear", "mm"})


def _is_weight(value: Value, x: Value, facts: Facts) -> bool:
    """Whether a layer was given something made of parameters alone, by operations that are read or not (weight
    normalisation, a quantised weight)."""
    return value.name in _LAYERS and x is value.inputs[1] and x not in facts.computed


def _is_raw(value: Value, operands: list[Value], facts: Facts) -> bool:
    if value.kind not in ("layout", "pointwise", "border") or not operands or not all(x in facts.raw for x in operands):
        return False
    grows = value.name == "expand" and numel(value) > numel(operands[0])
    return not grows


_CHEAP = 4
"""Pointwise operations a kernel may repeat per score to spare a captured tensor of that size."""


def _cost(value: Value, operands: list[Value], size: float, facts: Facts) -> float:
    if value.kind == "layout":
        facts.work[value] = facts.work[operands[0]]
        return min(size, facts.cost[operands[0]])
    if value.kind == "pointwise" and value.name != "dropout" and is_exact(value):
        work = sum(facts.work[x] for x in operands) + (value.name != "identity")
        cost = sum(facts.cost[x] for x in set(operands))
        if work <= _CHEAP and cost < size:
            facts.work[value] = work
            return cost
    facts.work[value] = 0
    return size
