"""A Dynamo backend that rewrites every captured graph in several ways and runs whichever is asked for.

    rewrites = Rewrites();  compiled = torch.compile(model, backend=rewrites)
    with rewrites.use(Way(1)): compiled(x)

One trace of the model serves every comparison.  No Inductor: the graphs run as they are, so that what differs between
two ways is the rewrite and what computes it, and nothing else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from kvt_compile.kernels.op import lowerings
from kvt_compile.passes.canonical.modes import Mode, ambient
from kvt_compile.passes.decide import Decision, Policy
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.passes.site import AttentionSite, Axis
from kvt_compile.topk import TopK

EVERY_AXIS: frozenset[Axis] = frozenset({"token", "channel", "batch"})


@dataclass(frozen=True)
class Way:
    """One way to rewrite: how many keys a site keeps, what computes it, and which site alone."""

    topk: TopK = 1.0
    lowering: str = "auto"
    only: tuple[int, int] | None = None
    """(number of the graph, number of the site among those of the graph that are rewritten); None: every site."""


EVERY = Way()
NONE = Way(only=(-1, -1))
"""The model as it is, through the same graphs."""


@dataclass
class Rewrites:
    """The backend.  `EVERY` is in use until another way is chosen."""

    policy: Policy = field(default_factory=lambda: Policy(axes=EVERY_AXIS))
    """Which sites are rewritten; how many keys they keep is the way's."""
    lowering: str = "auto"
    """What computes them where the way says "auto"."""
    results: list[PassResult] = field(default_factory=list)
    """What the passes said about each captured graph."""
    runs: list[int] = field(default_factory=list)
    """Every execution of a graph, by its number: code that several layers share is captured once and run often."""
    graphs: list[fx.GraphModule] = field(default_factory=list)
    """The captured graphs as they were."""
    seconds: float = 0.0
    """Time the passes took, over all graphs."""
    current: Way = EVERY
    seen: dict[int, tuple[Any, ...]] | None = None
    """While somebody asks: number of a graph -> the inputs it first ran on."""

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        number, entry = len(self.results), ambient()
        self.graphs.append(copied(gm))
        started = time.perf_counter()
        everything, result = self._rewritten(number, EVERY, entry)
        self.results.append(result)
        self.seconds += time.perf_counter() - started
        made = {repr(EVERY): everything}  # (by its text: 1 key and a share of 1.0 are equal)

        def run(*inputs: Any) -> Any:
            self.runs.append(number)
            if self.seen is not None:
                self.seen.setdefault(number, inputs)
            way = repr(self.current)
            if way not in made:
                while len(made) > 1:  # ways come one after the other, and each is a graph
                    made.popitem()
                made[way] = self._rewritten(number, self.current, entry)[0]
            return made[way](*inputs)

        return run

    @contextmanager
    def use(self, way: Way) -> Iterator[None]:
        before, self.current = self.current, way
        try:
            yield
        finally:
            self.current = before

    def sites(self) -> Iterator[tuple[tuple[int, int], AttentionSite]]:
        """Every site that is rewritten, as `Way.only` names it."""
        for number, result in enumerate(self.results):
            rewritten: list[Decision] = [d for d in result.decisions if d.topk is not None]
            yield from (((number, n), decision.site) for n, decision in enumerate(rewritten))

    def _rewritten(self, number: int, way: Way, entry: Mode) -> tuple[fx.GraphModule, PassResult]:
        graph = copied(self.graphs[number])
        policy = replace(self.policy, topk=_rule(way, number), force_rewrite=True)
        lowering = self.lowering if way.lowering == "auto" else way.lowering
        inside = lowerings.inside()
        lowering = inside.lowering if lowering == "auto" else lowering
        return graph, run_passes(graph, policy, lowering=lowering, entry=entry, ranks=inside.ranks)


def _rule(way: Way, number: int) -> TopK | Callable[[AttentionSite], TopK | None]:
    if way.only is None:
        return way.topk
    asked = 0  # decisions are made in the order of the sites, and a rule is asked for those alone that may be rewritten

    def rule(site: AttentionSite) -> TopK | None:
        nonlocal asked
        asked += 1
        return way.topk if way.only == (number, asked - 1) else None

    return rule


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph to rewrite on its own, nested graphs (checkpoint, control flow) included; tensors are shared."""
    graph = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    graph.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(graph, name, copied(child))
    return graph
