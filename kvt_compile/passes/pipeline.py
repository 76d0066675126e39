"""The passes in order: the whole compiler as one list.

resolve packets -> expand composites -> take sums apart -> canonicalise -> find -> decide -> rewrite

The same inside every nested graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from kvt_compile.passes.batch import no_such_batch
from kvt_compile.passes.canonical.canonicalise import CanonicalGraph, canonicalise
from kvt_compile.passes.canonical.expand import expand_composites
from kvt_compile.passes.canonical.inputs import INPUT, input_ranks
from kvt_compile.passes.canonical.modes import Mode, mode_of_body, modes_of, undisturbed
from kvt_compile.passes.canonical.packets import resolve_packets
from kvt_compile.passes.decide import Decision, Policy, decide, unmatched_patterns
from kvt_compile.passes.finding.find import Found, find
from kvt_compile.passes.finding.sums import find_sums
from kvt_compile.passes.rewriting.apart import take_apart
from kvt_compile.passes.rewriting.names import know_names
from kvt_compile.passes.rewriting.rewrite import rewrite
from kvt_compile.passes.rewriting.trial import with_functions_called
from kvt_compile.passes.site import OwnK, Refusal

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
    inputs: Mapping[str, int] = field(default_factory=dict)
    """The inputs of the model that the graph reads, and how many axes each has; the empty name for what is none."""

    @property
    def has_functions(self) -> bool:
        """Whether a function of a selection is called in the rewritten graph."""
        return any(x.topk is not None and x.select is not None and x.select.functions for x in self.decisions)


def unmet(policy: Policy, results: Sequence[PassResult]) -> str | None:
    """A sentence about what a user asked for and no graph of the model has: a pattern of modules, an input; or None."""
    inputs = {name: rank for result in results for name, rank in result.inputs.items()}
    sites = [decision.site for result in results for decision in result.decisions]
    return unmatched_patterns(policy, sites) or no_such_batch(policy.batch_dim, inputs)


def run_passes(
    gm: fx.GraphModule,
    policy: Policy,
    *,
    lowering: str = "auto",
    tolerance: float = 0.0,
    origins: dict[str, str] | None = None,
    apply: bool = True,
    watch: Watch | None = None,
    entry: Mode | None = None,
    ranks: int = 1,
) -> PassResult:
    """Runs every pass over a graph and the graphs nested in it (checkpoint and control-flow bodies).

    Args:
        gm: graph with fake values in its nodes' meta; changed in place when `apply`.
        policy: which sites to rewrite and how many keys to keep.
        lowering: name of the lowering the new nodes ask for.
        tolerance: by which share of k the number of keys a row keeps may differ from k.
        origins: placeholder name -> "parameter" | "buffer", where the capture knows.
        apply: False only finds and decides (composites are still expanded, with the same meaning).
        watch: is shown every graph between the passes; it must not change it.
        entry: the mode the graph runs in from its start, where it is known (a graph of Dynamo: `ambient()`).
        ranks: over how many the queries and keys of every site are cut: `topk` speaks of the keys of all.

    Nothing of the process the passes run in is seen by the operators they run on fake tensors, and nothing sees those.
    """
    with undisturbed():
        return _run(gm, policy, lowering, tolerance, origins, apply, watch, entry or Mode(), ranks)


def _run(
    gm: fx.GraphModule, policy: Policy, lowering: str, tolerance: float, origins: dict[str, str] | None, apply: bool,
    watch: Watch | None, entry: Mode, ranks: int,
) -> PassResult:  # fmt: skip
    changed = False
    decisions: list[Decision] = []
    refusals: list[Refusal] = []
    inputs: dict[str, int] = {}
    for name, graph, mode, body_of in _named_graphs(gm, entry):
        know_names(graph.graph)
        resolve_packets(graph)
        expand_composites(graph, mode)
        if name:
            _hide_inputs(graph)
        found, decided, read = _decided(graph, policy, ranks, origins, mode, body_of)
        inputs = inputs if name else read
        if watch:
            watch("found", name, graph, decided, found.refusals)
        if apply:
            changed |= rewrite(graph, decided, lowering, tolerance, ranks, mode)
            if watch:
                watch("rewritten", name, graph, decided, found.refusals)
        decisions += decided
        refusals += found.refusals
        if log.isEnabledFor(logging.DEBUG):
            _tell(decided, found.refusals)
    return PassResult(changed, tuple(decisions), tuple(refusals), inputs)


def _hide_inputs(nested: fx.GraphModule) -> None:
    """What goes into a graph within the graph is no input of the model."""
    for node in nested.graph.nodes:
        if node.op == "placeholder":
            node.meta[INPUT] = ""


def _decided(
    gm: fx.GraphModule, policy: Policy, ranks: int, origins: dict[str, str] | None, mode: Mode, body_of: str
) -> tuple[Found, list[Decision], dict[str, int]]:
    """Sites, decisions, and the inputs that are read.  A product with a sum of maps is taken apart for good where that
    makes a kernel of a map."""

    def look(graph: CanonicalGraph) -> tuple[Found, list[Decision], dict[str, int]]:
        found = find(graph)
        decisions = [decide(site, policy, ranks) for site in found.sites]
        decisions = [with_functions_called(gm, decision, mode, body_of) for decision in decisions]
        return found, decisions, input_ranks(graph.values)

    graph = canonicalise(gm, origins, mode)
    apart = take_apart(gm.graph, find_sums(graph, dict(gm.named_modules())), graph.modes)
    if not apart:
        return look(graph)
    found, decided, read = look(canonicalise(gm, origins, mode))
    fused = {x.site.plan.node for x in decided if x.site.tier == "fused" and x.topk is not None}
    back = [one for one in apart if not one.is_worth_it(fused)]
    for one in apart:
        if one in back:
            one.restore()
        else:
            one.settle()
    gm.recompile()
    return look(canonicalise(gm, origins, mode)) if back else (found, decided, read)


def _tell(decided: Sequence[Decision], refusals: Sequence[Refusal]) -> None:
    """One record a site and a refusal; `record.kvt` has the same as data, for handlers that write JSON."""
    for decision in decided:
        site = decision.site
        facts = {
            "event": "left dense" if decision.topk is None else site.tier, "module": site.where.module,
            "file": site.where.file, "line": site.where.line, "queries": site.queries, "keys": site.keys,
            "topk": str(decision.topk) if isinstance(decision.topk, OwnK) else decision.topk,
            "own_k": str(site.own or ""), "score": site.score,
            "reason": decision.reason or site.tier_reason,
        }  # fmt: skip
        kept = decision.reason if decision.topk is None else f"k = {decision.topk} of {site.keys}, score {site.score}"
        log.debug("%s: %s: %s", facts["event"], site.where, kept, extra={"kvt": facts})
    for refusal in refusals:
        facts = {
            "event": "left alone", "module": refusal.where.module, "file": refusal.where.file,
            "line": refusal.where.line, "node": refusal.node.name, "step": refusal.step, "reason": refusal.reason,
        }  # fmt: skip
        log.debug("left alone: %s (%s): %s", refusal.node, refusal.where, refusal.reason, extra={"kvt": facts})


def nested_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and every graph module one of its nodes refers to, outermost first."""
    return (graph for _, graph, *_ in _named_graphs(gm, Mode()))


def _named_graphs(gm: fx.GraphModule, entry: Mode) -> Iterator[tuple[str, fx.GraphModule, Mode, str]]:
    """Name, graph, the mode it starts in, and the operator it is the body of (empty for the outermost)."""
    seen: set[int] = set()
    queue = [("", gm, entry, "")]
    while queue:
        name, graph, mode, body_of = queue.pop(0)
        if id(graph) in seen:
            continue
        seen.add(id(graph))
        yield name, graph, mode, body_of
        modes = modes_of(graph.graph, mode)
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                body = getattr(graph, str(node.target), None)
                if isinstance(body, fx.GraphModule):
                    user = next(iter(node.users), node)
                    inside = mode_of_body(user, modes[user])
                    operator = str(getattr(user.target, "__name__", user.target))
                    queue.append((f"{name}.{node.target}".lstrip("."), body, inside, operator))
