"""Cells, budget, verdicts: the part of the GPU benchmark that needs no GPU.

    cells in order of importance -> prepare every contestant -> medians in turns -> ratios beside their targets

Nothing is estimated: a number is a median of this run or absent, and what is absent has a reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvt_compile.kernels.tune.timing import Clock, Run, take_turns

SIZES = (197, 256, 576, 1024, 2048, 4096, 16384)
TOKENS = 32768
WIDTH = 768
OURS, TOLERANT, SDPA, FLEX, EAGER, COMPILED = "ours", "ours 0.02", "sdpa", "flex", "eager", "compiled"
TOLERANCE = 0.02
COMPILING = {FLEX: 0.2, COMPILED: 0.2}
"""Contestants that torch compiles anew for every cell, and which share of the whole time each may take for that."""
ERROR = {"bfloat16": 1e-2, "float32": 2e-4}
"""Largest relative error |out - exact| / |exact| of a right result: tf32 products would come near 3e-4."""


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and pass."""

    dtype: str
    dim: int
    size: int
    topk: int
    backward: bool

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.size)

    @property
    def heads(self) -> int:
        return WIDTH // self.dim

    def __str__(self) -> str:
        share = f"N/{round(self.size / self.topk)}"
        return f"{self.dtype} D={self.dim} N={self.size} k={share} {'fwd+bwd' if self.backward else 'forward'}"


def cells(
    dtypes: Sequence[str] = ("bfloat16", "float32"), dims: Sequence[int] = (64, 128), sizes: Sequence[int] = SIZES
) -> list[Cell]:
    """Every cell, the most telling first: what the time does not suffice for is at the end."""
    return [
        Cell(dtype, dim, size, -(-size // part), backward)
        for dtype in dtypes
        for dim in dims
        for part in (2, 8)
        for backward in (False, True)
        for size in sizes
    ]


@dataclass(frozen=True)
class Target:
    """One bar of the project's table, for an H100 or H200: a ratio that should be at most (or at least) so large."""

    name: str
    limit: float
    stretch: float | None = None
    at_least: bool = False

    def text(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}" + (f" ({self.stretch:g})" if self.stretch else "")

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def targets(cell: Cell) -> tuple[Target, ...]:
    """The bars of a cell; float32 has none."""
    if cell.dtype != "bfloat16":
        return ()
    if cell.backward:
        time = Target("time / sdpa", 1.4, 1.15)
    elif cell.size <= 256:
        time = Target("time / sdpa", 2.0, 1.3)
    else:
        time = Target("time / sdpa", 2.5, 1.5)
    return (
        time,
        Target("eager / time", 10.0, 20.0, at_least=True),
        Target("compiled / time", 5.0, 10.0, at_least=True),
        Target("memory / sdpa", 1.1),
    )


MODEL_TARGET = Target("time / dense", 1.10, 1.03)


@dataclass
class Measured:
    """What one cell gave."""

    cell: Cell
    ms: dict[str, float] = field(default_factory=dict)
    """Contestant -> median."""
    peak_mb: dict[str, float] = field(default_factory=dict)
    """Contestant -> most memory allocated by one run beyond its inputs."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Contestant -> why it has no number."""
    error: float | None = None
    """Of ours, exact, forward."""
    notes: dict[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """By the names of `targets`, and the tolerant one's time; a ratio without both its numbers is absent."""
        found = {
            "time / sdpa": _ratio(self.ms, OURS, SDPA),
            "tolerant / sdpa": _ratio(self.ms, TOLERANT, SDPA),
            "eager / time": _ratio(self.ms, EAGER, OURS),
            "compiled / time": _ratio(self.ms, COMPILED, OURS),
            "flex / time": _ratio(self.ms, FLEX, OURS),
            "memory / sdpa": _ratio(self.peak_mb, OURS, SDPA),
        }
        return {name: x for name, x in found.items() if x is not None}

    def to_dict(self) -> dict[str, Any]:
        ratios = self.ratios()
        verdicts = [
            asdict(t) | {"ratio": ratios[t.name], "met": t.met(ratios[t.name])}
            for t in targets(self.cell)
            if t.name in ratios
        ]
        return {**asdict(self), "name": str(self.cell), "ratios": ratios, "targets": verdicts}


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
            exception's text.
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
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
