"""Candidates -> their times: each is run once, then all that could be run take turns.

Effort, Unfit        how much time that may take; what is not worth timing
measure, race        in this process
Apart, Outcome       what measures in another one, and what it gives
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kvt_compile.kernels.tune.timing import Clock, Run, take_turns

C = TypeVar("C")
Tell = Callable[[C], None]
"""Told of every candidate before it is tried."""


class Unfit(Exception):  # noqa: N818 - an outcome of a run, not an error
    """Raised by `run` for a candidate that is not worth timing; the text says why ("spills 12 registers")."""


@dataclass(frozen=True)
class Effort:
    """How much time a key may take."""

    wait_s: float = 120.0
    """For another process that measures."""
    seconds: float = 2.0
    """For measuring the best candidates against each other, compilation not counted."""
    first_turns: int = 3
    """After these, candidates slower than `margin` times the best drop out."""
    margin: float = 1.25
    finalists: int = 6
    turns: int = 7
    """Of each finalist, at least."""


class CannotMeasureError(Exception):
    """No other process can measure; its text says why."""


@dataclass
class Outcome(Generic[C]):
    """Milliseconds of what could be timed, and why the others could not."""

    times: list[tuple[C, float]] = field(default_factory=list)
    dropped: list[tuple[C, str]] = field(default_factory=list)


class Apart(Protocol[C]):
    """Measures in another process."""

    def __call__(self, candidates: Sequence[C], effort: Effort, tell: Tell[C], /) -> Outcome[C]:
        """Raises CannotMeasureError."""


def measure(
    candidates: Sequence[C], run: Callable[[C], Run], clock: Clock, effort: Effort, tell: Tell[C]
) -> Outcome[C]:
    """In this process.  `run`: candidate -> a function that runs it once; either may raise.

    Raises what a candidate raises once it could be run."""
    outcome, ready = Outcome[C](), list[tuple[C, Run]]()
    for candidate in candidates:
        tell(candidate)
        try:
            runner = run(candidate)
            clock.milliseconds(runner)  # compiles; what fails, fails here
            ready.append((candidate, runner))
        except Exception as error:
            outcome.dropped.append((candidate, reason_of(error)))
    times = race([runner for _, runner in ready], clock, effort) if ready else []
    outcome.times = [(candidate, ms) for (candidate, _), ms in zip(ready, times, strict=True)]
    return outcome


def race(runs: Sequence[Run], clock: Clock, effort: Effort) -> list[float]:
    """Median milliseconds: few turns of all, then more of those that are near the best."""
    turns = take_turns(runs, clock, 0.0, effort.first_turns, effort.first_turns)
    first = [statistics.median(x) for x in turns]
    near = sorted((n for n, x in enumerate(first) if x <= effort.margin * min(first)), key=first.__getitem__)
    finalists = near[: effort.finalists]
    if len(finalists) > 1:
        more = take_turns([runs[n] for n in finalists], clock, effort.seconds, effort.turns)
        for n, times in zip(finalists, more, strict=True):
            turns[n] += times
    result = [statistics.median(x) for x in turns]
    # who dropped out lost, whatever the finalists' later turns were slowed by
    worst = max(result[n] for n in finalists)
    return [x if n in finalists else max(x, worst) for n, x in enumerate(result)]


def reason_of(error: BaseException) -> str:
    """One line: `OutOfResources: shared memory`, or an Unfit's own text."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, Unfit) else f"{type(error).__name__}: {text}" if text else type(error).__name__
