"""Contestants + seconds -> medians in turns, with a reason for every number that is absent.

Nothing is estimated: a number is a median of this run or absent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.bars import bars_of
from benchmarks.gpu.cells import COMPILED, EAGER, FLEX, OURS, SDPA, TOLERANT, Cell
from kvt_compile.kernels.tune.timing import Clock, Run, take_turns

COMPILING = {FLEX: 0.25, COMPILED: 0.25}
"""Contestants that torch compiles anew for every cell, and which share of the whole time each may take for that."""
ERROR = {"bfloat16": 1e-2, "float32": 2e-4}
"""Largest relative error |x - exact| / |exact| of a right result: tf32 products would come near 3e-4."""


class WrongError(Exception):
    """A result that is none; the text says how far off it is."""


@dataclass
class Measured:
    """What one race gave."""

    cell: Cell
    ms: dict[str, float] = field(default_factory=dict)
    """Contestant -> median."""
    peak_mb: dict[str, float] = field(default_factory=dict)
    """Contestant -> most memory allocated by one run beyond its inputs."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Contestant -> why it has no number."""
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        found = ratios(self.ms, self.peak_mb)
        verdicts = [
            {
                "bar": bar.name,
                "ratio": found[bar.ratio],
                "must": bar.must,
                "aim": bar.aim,
                "met": bar.met(found[bar.ratio]),
            }
            for bar in bars_of(self.cell)
            if bar.ratio in found
        ]
        about = {"cell": str(self.cell), "batch": self.cell.batch, "heads": self.cell.heads}
        return {
            **about, "ms": self.ms, "peak_mb": self.peak_mb, "ratios": found, "bars": verdicts, "dropped": self.dropped,
            "notes": self.notes,
        }  # fmt: skip


def ratios(ms: Mapping[str, float], peak_mb: Mapping[str, float]) -> dict[str, float]:
    """By the names that `bars.BARS` uses, and some more; a ratio without both its numbers is absent."""
    found = {
        "time / sdpa": _ratio(ms, OURS, SDPA),
        "tolerant / sdpa": _ratio(ms, TOLERANT, SDPA),
        "eager / time": _ratio(ms, EAGER, OURS),
        "compiled / time": _ratio(ms, COMPILED, OURS),
        "flex / time": _ratio(ms, FLEX, OURS),
        "memory / sdpa": _ratio(peak_mb, OURS, SDPA),
    }
    return {name: x for name, x in found.items() if x is not None}


def _ratio(numbers: Mapping[str, float], above: str, below: str) -> float | None:
    if above not in numbers or not numbers.get(below):
        return None
    return numbers[above] / numbers[below]


class Budget:
    """Seconds for the whole run, and which share of them a contestant may spend on compiling."""

    def __init__(self, seconds: float, now: Callable[[], float], shares: Mapping[str, float] = COMPILING) -> None:
        self.seconds, self._now, self._shares = seconds, now, shares
        self._start = now()
        self._spent: dict[str, float] = {}
        self._longest: dict[str, float] = {}

    def spent(self) -> float:
        return self._now() - self._start

    def left(self) -> float:
        return self.seconds - self.spent()

    def refusal(self, contestant: str) -> str | None:
        """Why a contestant should not be prepared now: it would, going by its longest so far, not fit."""
        next_time = self._longest.get(contestant, 0.0)
        if next_time > self.left():
            return f"not run: {self.left():.0f} of {self.seconds:.0f} s were left, and preparing took {next_time:.0f}"
        share = self._shares.get(contestant)
        if share is not None and self._spent.get(contestant, 0.0) + next_time > share * self.seconds:
            return f"not run: its share of the time for compiling, {share * self.seconds:.0f} s, is spent"
        return None

    def note(self, contestant: str, seconds: float) -> None:
        """Preparing took so long."""
        self._spent[contestant] = self._spent.get(contestant, 0.0) + seconds
        self._longest[contestant] = max(self._longest.get(contestant, 0.0), seconds)


Prepare = Callable[[], Run]


def measure(
    cell: Cell,
    contestants: Mapping[str, Prepare],
    clock: Clock,
    budget: Budget,
    peak: Callable[[Run], float],
    seconds: float = 0.6,
) -> Measured:
    """Prepares every contestant, weighs its memory, and lets those that run take turns.

    Args:
        contestants: name -> a function that builds what is timed; it may raise, which drops the contestant with the
            exception's text.  What checks itself raises `WrongError` here, before anything is timed.
        peak: run -> megabytes allocated at most beyond what was there before.
        seconds: for the turns; five are taken at least, three where one round takes longer than that.
    """
    result = Measured(cell)
    if budget.left() <= 0:
        result.dropped = dict.fromkeys(contestants, f"not run: the {budget.seconds:.0f} s of the whole run are spent")
        return result
    runs: dict[str, Run] = {}
    warm = 0.0
    for name, prepare in contestants.items():
        if reason := budget.refusal(name):
            result.dropped[name] = reason
            continue
        start = clock.now()
        try:
            run = prepare()
            run()  # compiles
            result.peak_mb[name] = peak(run)
            warm += clock.milliseconds(run) / 1e3
            runs[name] = run
        except Exception as error:
            result.dropped[name] = reason_of(error)
        budget.note(name, clock.now() - start)
    if runs:
        try:
            turns = take_turns(list(runs.values()), clock, seconds, at_least=3 if warm > seconds else 5)
        except Exception as error:
            result.dropped |= dict.fromkeys(runs, f"timing failed: {reason_of(error)}")
        else:
            result.ms = {name: statistics.median(x) for name, x in zip(runs, turns, strict=True)}
    return result


def reason_of(error: BaseException) -> str:
    """One line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"wrong: {text}" if isinstance(error, WrongError) else f"{type(error).__name__}: {text}"
