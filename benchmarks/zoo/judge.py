"""Entry -> `Verdict`: what the finder made of every attention of the model, and whether the meaning was kept.

k = N        the rewritten model against the dense one: outputs in float32
gradients    `kvt_compile.verify`: every gradient too, in training mode without dropout       (one model per family)
k < N        half of the keys, in float64: every site beside the reference                        (one model per family)
bite         how far the output moves when a single key is kept: what these checks are able to notice
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch

import kvt_compile
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.models import Built, build
from benchmarks.zoo.tally import tally
from kvt_compile.verification.beside import NAME, beside_the_reference
from kvt_compile.verification.compare import FLOAT64, compare, distance, settled
from kvt_compile.verification.copies import doubled
from kvt_compile.verification.facts import Difference
from kvt_compile.verification.outcome import Run
from kvt_compile.verification.ways import Rewrites, Way

Check = dict[str, float]
"""error and budget, both relative to the largest value of the tensor that comes closest to its budget; and bits, 64
where only float64 could say: float32 rounding had sent the model another way"""


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
    rewrites = Rewrites()
    with many_graphs(), torch.no_grad():
        run = Run(model, args, kwargs, backward=False)
        dense = run()
        compiled = torch.compile(model, backend=rewrites)
        everything = run(compiled)
        vars(verdict).update(asdict(tally(entry, rewrites, tuple(rewrites.runs))))
        verdict.graphs, verdict.pass_seconds = len(rewrites.results), round(rewrites.seconds, 2)
        if not entry.count and not any(result.changed for result in rewrites.results):
            verdict.seconds = round(time.perf_counter() - started, 1)
            return verdict  # nothing was rewritten: there is nothing to compare
        with rewrites.use(Way(1)):
            single = run(compiled)
        wide = Run(*doubled(model, args, kwargs), backward=False)
        exact = wide()
        check = compare(everything, dense, exact)
        if not settled(check):
            again = wide(torch.compile(wide.model, backend=Rewrites()))
            check = replace(compare(again, dense, exact, unit=FLOAT64), bits=64)
        verdict.checks["k = N"] = _plain(check)
        if entry.count:
            verdict.bite = distance(single, exact)
        if deep and entry.gradients:
            verdict.checks["k < N"] = half(wide)
    if deep and entry.gradients:
        del model, compiled, wide, run
        verdict.checks["gradients"] = trained(entry, make)
    verdict.seconds = round(time.perf_counter() - started, 1)
    return verdict


def half(wide: Run) -> Check:
    """Half of the keys, in float64: every site beside the reference on the same inputs."""
    rewrites = Rewrites()
    with beside_the_reference() as sites, rewrites.use(Way(0.5, NAME)):
        wide(torch.compile(wide.model, backend=rewrites))
    return _plain(sites.worst) if sites.calls else {"error": float("inf"), "budget": 0.0}


def trained(entry: Entry, make: Callable[..., Built] = build) -> Check:
    """Every gradient at k = N."""
    model, args, kwargs = make(entry, **entry.small)
    axes = {"channel_attention": "rewrite", "batch_attention": "rewrite"}
    found = kvt_compile.verify(model.train(), *args, **kwargs, **axes, one_by_one=False, reproduce_in=False)
    wrong = found.first.worst if found.first else found.together
    return _plain(wrong) if wrong else {"error": float("inf"), "budget": 0.0}


def _plain(check: Difference) -> Check:
    return {"error": check.error, "budget": check.budget} | ({"bits": 64} if check.bits == 64 else {})


@contextmanager
def many_graphs() -> Iterator[None]:
    """More graphs than usual may come from one piece of code."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
