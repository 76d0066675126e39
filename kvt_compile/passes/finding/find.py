"""Canonical graph -> attention sites and refusals.  No pattern list: each softmax is read both ways (softmax_site.py),
and each SDPA call by its definition (sdpa_site.py).

Three outcomes: fused (the whole region is an expression), scores kept (it is attention, but something between the
products is not pointwise, or somebody else reads the map), refused (with the step that failed and why).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.modes import Mode
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.describe import place
from kvt_compile.passes.finding.maps import find_maps, refusal_of
from kvt_compile.passes.finding.miss import Miss
from kvt_compile.passes.finding.own.absorb import absorb_selections
from kvt_compile.passes.finding.sdpa_site import read_sdpa
from kvt_compile.passes.finding.softmax_site import read_softmax
from kvt_compile.passes.finding.thinned import thinned
from kvt_compile.passes.reading.facts import Facts, gather_facts
from kvt_compile.passes.site import AttentionSite, Refusal


@dataclass(frozen=True)
class Found:
    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]


def find(graph: CanonicalGraph) -> Found:
    """Every site of the graph in program order, and a refusal for every other softmax, and for every other map."""
    absorb_selections(graph)
    facts = gather_facts(graph)
    sites: list[AttentionSite] = []
    refusals: list[Refusal] = []
    for value in graph.values:
        if value.attrs.get("absorbed"):
            continue  # the model selected by these weights, and read them for nothing else
        if _is_anchor(value) and (reason := _stays_dense(graph.modes[value.node])):
            refusals.append(Refusal(value.node, place(value.node), reason, "modes", value.node))
            continue
        if value.kind == "softmax":
            found, miss = read_softmax(graph, facts, value)
        elif value.kind == "sdpa":
            found, miss = _sdpa(facts, value)
        elif _softmax_like(value):
            words = _LAYER if value.node.op == "call_module" else _SOFTMAX_LIKE.get(value.name, _OPERATOR)
            found, miss = [], Miss("scores", value, f"{value.name} {words}")
        else:
            continue
        sites += found
        if miss is not None:
            refusals.append(Refusal(value.node, place(value.node), miss.reason, miss.step, miss.value.node, value))
    for found_map in find_maps(graph, facts, _is_anchor):
        site = None if _stays_dense(graph.modes[found_map.product.node]) else thinned(graph, facts, found_map)
        if site is not None:
            sites.append(site)
        else:
            refusals.append(refusal_of(found_map))
    return Found(tuple(sites), tuple(refusals))


_SOFTMAX_LIKE = {
    **dict.fromkeys(
        ("softmax", "masked_softmax", "scaled_dot_product_attention"), "with these arguments is not understood"
    ),
    "flex_attention": "has a sparsity of its own, and a score function that is no part of this graph",
    "gumbel_softmax": "adds noise to the scores that is drawn inside it",
}


_LAYER = "has hooks, a forward of its own, or arguments that are not understood"
_OPERATOR = "is read in more than its output, or has arguments that are not understood"
"""Of an operator that SDPA runs, which has log-sum-exps or weights beside its output."""


def _is_anchor(value: Value) -> bool:
    return value.kind in ("softmax", "sdpa") or _softmax_like(value)


def _softmax_like(value: Value) -> bool:
    """Whether it is one of the operations that compute a softmax in a way that is not read."""
    known = value.name in _SOFTMAX_LIKE or value.name.startswith("_scaled_dot_product")
    return value.kind == "opaque" and known and "within" not in value.attrs


def _stays_dense(mode: Mode) -> str:
    """Why nothing is rewritten where a node runs in this mode; empty where it may be."""
    if mode.custom:
        return "it is part of a torch.autograd.Function or a hook, whose derivative is written for the dense map"
    if mode.transforms:
        levels = " of ".join(f"torch.func.{level}" for level in dict.fromkeys(mode.transforms))
        return f"it runs under {levels} inside the compiled function (rewrite() or topk_attention run under torch.func)"
    return ""


def _sdpa(facts: Facts, anchor: Value) -> tuple[list[AttentionSite], Miss | None]:
    try:
        return [read_sdpa(facts, anchor)], None
    except Miss as miss:
        return [], miss
