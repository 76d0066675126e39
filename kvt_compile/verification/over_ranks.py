"""A model that runs on a rank's part of a sequence -> is it the model on the whole of it?

    whole    the model as it is, on the whole sequence in this process, its outputs cut to this rank's rows
    found    the model at k = N on this rank's part, as it is captured here: inside of context_parallel or not

An attention whose keys are a part cannot be told from one that has them all by looking at it; by its result it can.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvt_compile.verification.compare import FLOAT64, LOOSE, compare, distance, settled
from kvt_compile.verification.facts import Findings
from kvt_compile.verification.outcome import Outcome, Run
from kvt_compile.verification.ways import Rewrites

Rewritten = Callable[[Run], AbstractContextManager[tuple[Callable[..., Any], Rewrites]]]
OWN_KEYS = (
    "what this rank computes is attention over its own keys, and not over the whole sequence: compile and run the "
    "model inside of kvt_compile.parallel.context_parallel, with inputs cut by its `shard` and `positions`"
)
NOTE = "this rank's part of a sequence beside the whole of it; gradients were not compared"


@dataclass(frozen=True)
class Whole:
    """The model on the whole sequence."""

    dense: Outcome
    exact: Outcome
    """In float64."""
    cut: Callable[[Tensor], Tensor]
    """One of its outputs -> this rank's rows of it."""

    def rows(self, outcome: Outcome) -> Outcome:
        return Outcome({n: self.cut(x) if torch.is_tensor(x) else x for n, x in _returned(outcome).items()})


def beside_the_whole(whole: Whole, run: Run, wide: Run, rewritten: Rewritten, unit: float) -> Findings:
    """`run` and `wide`: this rank's part, in the model's own precision and in float64.  Both run whatever comes out of
    the first: ranks wait for one another, and must not decide each for itself.  `unit` as `compare` takes it."""
    with rewritten(run) as (call, rewrites):
        found = Outcome(_returned(run(call)))
        sites = list(rewrites.sites())
    with rewritten(wide) as (call, _):
        found_wide = Outcome(_returned(wide(call)))
    dense, exact = whole.rows(whole.dense), whole.rows(whole.exact)
    check = compare(found, dense, exact, unit=unit)
    if not settled(check):
        check = replace(compare(found_wide, dense, exact, unit=FLOAT64), bits=64)
    if not sites:
        return Findings((), None if check.ok else check, note=NOTE)
    alone = not check.ok and distance(found_wide, Outcome(_returned(wide()))) <= LOOSE
    return Findings((), check, (OWN_KEYS,) if alone else (), note=NOTE)


def _returned(outcome: Outcome) -> dict[str, Any]:
    return {name: x for name, x in outcome.outputs.items() if not name.endswith(" afterwards")}
