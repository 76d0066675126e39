"""Entry -> `Verdict`: what the finder made of every attention of the model, and whether the meaning was kept.

k = N        the rewritten model against the dense one: outputs in float32
gradients    the same for every parameter's gradient, in training mode without dropout        (one model per family)
k < N        lowering "aten" against lowering "reference", half of the keys, in float64       (one model per family)
bite         how far the output moves when a single key is kept: what these checks are able to notice
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.compare import FLOAT64, Check, compare, distance, doubled, gradients, quiet, run, settled
from benchmarks.zoo.models import Built, build
from benchmarks.zoo.tally import tally
from benchmarks.zoo.variants import Rewrites, Way


@dataclass
class Verdict:
    """What came out for one model; plain values, ready for JSON."""

    id: str
    fused: int = 0
    kept: int = 0
    """Scores kept: selection and softmax fused, the rest as the model wrote it."""
    dense: int = 0
    """Found, and left dense by default (attention over channels or over the batch)."""
    missed: list[str] = field(default_factory=list)
    """True sites that were not found."""
    false: list[str] = field(default_factory=list)
    """Found, but no attention, or attention over another axis."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(module path, reason) of every softmax left alone."""
    unexplained: int = 0
    """Softmaxes the model computes about which nothing was said."""
    kept_reasons: list[str] = field(default_factory=list)
    graphs: int = 0
    checks: dict[str, Check] = field(default_factory=dict)
    bite: float | None = None
    failure: str = ""
    """Why the model could not be judged to the end."""
    seconds: float = 0.0
    pass_seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What keeps this model from being green."""
        said = [self.failure] if self.failure else []
        said += [f"missed {path}" for path in self.missed] + [f"false match {path}" for path in self.false]
        said += [f"{self.unexplained} softmaxes unexplained"] if self.unexplained else []
        said += [
            f"{name}: error {check['error']:.1e}, budget {check['budget']:.1e}"
            for name, check in self.checks.items()
            if not check["error"] <= check["budget"]
        ]
        check = self.checks.get("k = N")
        if check and self.bite is not None and self.bite < 10 * check["budget"]:
            said.append(f"k = N would notice nothing: one key changes {self.bite:.1e}, budget {check['budget']:.1e}")
        return said


def judge(
    entry: Entry, *, deep: bool = True, verdict: Verdict | None = None, make: Callable[..., Built] = build
) -> Verdict:
    """Builds a model (`make`), finds, rewrites and compares; `deep` includes the comparisons made once per family.

    What was learnt before something raised stays in `verdict`.
    """
    started = time.perf_counter()
    verdict = verdict or Verdict(entry.id)
    model, args, kwargs = make(entry)
    rewrites = Rewrites({"all": Way(1.0), "one": Way(1)})
    with many_graphs(), torch.no_grad():
        dense = run(model, args, kwargs)
        compiled = torch.compile(model, backend=rewrites)
        everything = run(compiled, args, kwargs)
        vars(verdict).update(asdict(tally(entry, rewrites, tuple(rewrites.runs))))
        verdict.graphs, verdict.pass_seconds = len(rewrites.results), round(rewrites.seconds, 2)
        if not entry.count and not any(result.changed for result in rewrites.results):
            verdict.seconds = round(time.perf_counter() - started, 1)
            return verdict  # nothing was rewritten: there is nothing to compare
        with rewrites.use("one"):
            single = run(compiled, args, kwargs)
        wide = doubled(model, args, kwargs)
        exact = run(*wide)
        check = compare(everything, dense, exact)
        if not settled(check):
            again = run(torch.compile(wide[0], backend=Rewrites({"all": Way(1.0)})), *wide[1:])
            check = compare(again, dense, exact, unit=FLOAT64) | {"bits": 64}
        verdict.checks["k = N"] = check
        if entry.count:
            verdict.bite = distance(single, exact)
        if deep and entry.gradients:
            verdict.checks["k < N"] = half(*wide)
    if deep and entry.gradients:
        del model, compiled, wide
        verdict.checks["gradients"] = trained(entry, make)
    verdict.seconds = round(time.perf_counter() - started, 1)
    return verdict


def half(model: nn.Module, args: Any, kwargs: Any) -> Check:
    """Half of the keys, by two lowerings, in float64: there no rounding moves a key across the threshold."""
    rewrites = Rewrites({name: Way(0.5, name) for name in ("aten", "reference")})
    compiled = torch.compile(model, backend=rewrites)
    aten = run(compiled, args, kwargs)
    with rewrites.use("reference"):
        reference = run(compiled, args, kwargs)
    # models that cast to float32 inside are only that exact: between the two precisions lies what says "same keys"
    return {"error": distance(aten, reference), "budget": torch.finfo(torch.float32).eps}


def trained(entry: Entry, make: Callable[..., Built] = build) -> Check:
    """Every gradient at k = N."""
    model, args, kwargs = make(entry, **entry.small)
    quiet(model.train())
    dense = gradients(copy.deepcopy(model), args, kwargs)
    exact = gradients(*doubled(model, args, kwargs))

    def check(model: nn.Module, args: Any, kwargs: Any, unit: float) -> Check:
        with many_graphs():
            rewritten = gradients(model, args, kwargs, torch.compile(model, backend=Rewrites({"all": Way(1.0)})))
        if not dense.keys() == rewritten.keys() == exact.keys():
            return {"error": float("inf"), "budget": 0.0}
        return compare(*([g[name] for name in exact] for g in (rewritten, dense, exact)), unit=unit)

    wide = doubled(model, args, kwargs)
    said = check(model, args, kwargs, 1.0)
    return said if settled(said) else check(*wide, FLOAT64) | {"bits": 64}


@contextmanager
def many_graphs() -> Iterator[None]:
    """More graphs than usual may come from one piece of code."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
