"""The passes in order: the whole compiler as one list.

expand composites -> canonicalise -> find -> decide -> rewrite      (and the same inside every nested graph)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from .canonicalise import canonicalise
from .decide import Decision, Policy, decide
from .expand import expand_composites
from .find import find
from .rewrite import rewrite
from .site import Refusal

log = logging.getLogger("kvt_compile.passes")


Stage = Literal["found", "rewritten"]
Watch = Callable[[Stage, str, fx.GraphModule, Sequence[Decision], Sequence[Refusal]], None]
"""Is shown each graph when its sites are decided and when it is rewritten, with its name (empty for the outermost)."""


@dataclass(frozen=True)
class PassResult:
    """What the passes did to one captured graph (nested graphs included)."""

    changed: bool
    decisions: tuple[Decision, ...]
    refusals: tuple[Refusal, ...]


def run_passes(
    gm: fx.GraphModule,
    policy: Policy,
    *,
    lowering: str = "auto",
    origins: dict[str, str] | None = None,
    apply: bool = True,
    watch: Watch | None = None,
) -> PassResult:
    """Runs every pass over a graph and the graphs nested in it (checkpoint and control-flow bodies).

    Args:
        gm: graph with fake values in its nodes' meta; changed in place when `apply`.
        policy: which sites to rewrite and how many keys to keep.
        lowering: name of the lowering the new nodes ask for.
        origins: placeholder name -> "parameter" | "buffer", where the capture knows.
        apply: False only finds and decides (composites are still expanded, with the same meaning).
        watch: is shown every graph between the passes; it must not change it.
    """
    changed = False
    decisions: list[Decision] = []
    refusals: list[Refusal] = []
    for name, graph in _named_graphs(gm):
        expand_composites(graph)
        found = find(canonicalise(graph, origins))
        decided = [decide(site, policy) for site in found.sites]
        if watch:
            watch("found", name, graph, decided, found.refusals)
        if apply:
            changed |= rewrite(graph, decided, lowering)
            if watch:
                watch("rewritten", name, graph, decided, found.refusals)
        decisions += decided
        refusals += found.refusals
        for refusal in found.refusals:
            log.debug("left alone: %s (%s): %s", refusal.node, refusal.where, refusal.reason)
    return PassResult(changed, tuple(decisions), tuple(refusals))


def nested_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and every graph module one of its nodes refers to, outermost first."""
    return (graph for _, graph in _named_graphs(gm))


def _named_graphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    seen: set[int] = set()
    queue = [("", gm)]
    while queue:
        name, graph = queue.pop(0)
        if id(graph) in seen:
            continue
        seen.add(id(graph))
        yield name, graph
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                body = getattr(graph, str(node.target), None)
                if isinstance(body, fx.GraphModule):
                    queue.append((f"{name}.{node.target}".lstrip("."), body))
