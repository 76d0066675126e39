"""What a run does: parts by letter, each made of steps, each step a process with a share of the time.  Standard
library only.

The order is that of importance: what the time does not suffice for is at the end.  A share counts against those of the
steps that are still to come, so that what one step does not use goes to all that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 540.0
"""Of the whole run."""
RESERVE = 8.0
"""Of them, for starting and for the last report."""
MOST_DRY = 0.6
"""Of what is left, for one step of a dry run."""


@dataclass(frozen=True)
class Step:
    """One process."""

    part: str
    name: str
    """Of its module in this package."""
    share: float
    what: str


STEPS = (
    Step("a", "machine", 45, "versions, kvt doctor"),
    Step("b", "correct", 70, "forward and backward at 12 cells against float64"),
    Step("b", "suite", 100, "the tests that need a GPU, in 8 processes"),
    Step("c", "tuning", 95, "block sizes for ViT-B at 224 and for N = 1024, training"),
    Step("d", "speed", 125, "attention against its rivals, cell by cell"),
    Step("d", "model", 65, "a training step of ViT-B/16"),
    Step("e", "profiling", 32, "the two slowest cells taken apart"),
)


def chosen(parts: str) -> list[Step]:
    """The steps of "a,b,d": letters of parts or names of steps; empty: all of them, in their order.

    Raises ValueError naming what there is.
    """
    wanted = [x for x in parts.replace(",", " ").split() if x]
    known = {x for step in STEPS for x in (step.part, step.name)}
    if unknown := [x for x in wanted if x not in known]:
        raise ValueError(
            f"no part {', '.join(map(repr, unknown))}: parts are {', '.join(dict.fromkeys(s.part for s in STEPS))}, "
            f"their steps {', '.join(s.name for s in STEPS)}"
        )
    return [step for step in STEPS if not wanted or step.part in wanted or step.name in wanted]


def limit(left: float, remaining: Sequence[Step], dry: bool = False) -> float:
    """Seconds for the first of the steps that remain, of `left` for all of them.

    dry: compiling on few cores is what takes time then, and who compiles depends on what is in Triton's cache, so that
    a step may have most of what is left."""
    left = max(left, 0.0)
    if dry:
        return left * MOST_DRY if len(remaining) > 1 else left
    return left * remaining[0].share / sum(step.share for step in remaining)
