"""A Dynamo backend that rewrites every captured graph in several ways and runs whichever is asked for.

    rewrites = Rewrites({"all": Way(1.0), "one": Way(1)});  compiled = torch.compile(model, backend=rewrites)
    with rewrites.use("one"): compiled(x)

One trace of the model serves every comparison.  No Inductor: the graphs run as they are, so that what differs between
two ways is the rewrite and nothing else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.passes.site import Axis

EVERY_AXIS: frozenset[Axis] = frozenset({"token", "channel", "batch"})


@dataclass(frozen=True)
class Way:
    """One way to rewrite: how many keys every site keeps, and what computes it."""

    topk: float | int
    lowering: str = "auto"

    @property
    def policy(self) -> Policy:
        return Policy(topk=self.topk, force_rewrite=True, axes=EVERY_AXIS)


@dataclass
class Rewrites:
    """The backend.  The first way is in use until another is chosen."""

    ways: Mapping[str, Way]
    results: list[PassResult] = field(default_factory=list)
    """What the passes said about each captured graph."""
    runs: list[int] = field(default_factory=list)
    """Every execution of a graph, by its number: code that several layers share is captured once and run often."""
    seconds: float = 0.0
    """Time the passes took, over all graphs."""
    current: str = ""

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        number = len(self.results)
        graphs: dict[str, fx.GraphModule] = {}
        for name, way in self.ways.items():
            graphs[name] = _copy(gm)
            started = time.perf_counter()
            result = run_passes(graphs[name], way.policy, lowering=way.lowering)
            if len(graphs) == 1:
                self.results.append(result)
                self.seconds += time.perf_counter() - started

        def run(*inputs: Any) -> Any:
            self.runs.append(number)
            return graphs[self.current or next(iter(graphs))](*inputs)

        return run

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph to rewrite on its own, nested graphs (checkpoint, control flow) included; tensors are shared."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _copy(child))
    return copied
