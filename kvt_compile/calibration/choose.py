"""Curves -> what each attention keeps: where it hurts least comes first.

    predicted error of the output    E² = Σ (gain_s · error_s(k_s))²        gain: what the output makes of an error at s

All attentions begin at their cheapest choice (the smallest k of the grid, the fastest selection).  The next step is
always the one that lowers E² most for what it costs (keys, or time), so every point of the path costs more than the
one before it: one number says how far to go, and it can be looked for by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvt_compile.topk import TopK

Choice = TopK | str
"""How many keys are kept, or the text of a selection; 1.0 is every key."""
Levels = tuple[int, ...]
"""For every unit, the index of its choice."""


@dataclass(frozen=True)
class Unit:
    """What gets one choice: a module with attention, in the worst of its attentions where it has several.

    Every tuple is along the choices, which cost more and more; the last keeps every key.
    """

    path: str
    keys: int
    choices: tuple[Choice, ...]
    costs: tuple[float, ...]
    """In [0, 1]: the share of its keys that each choice keeps, or its time as a share of the longest."""
    mass: tuple[float, ...]
    mass_bound: tuple[float, ...]
    """What the mean mass is at least, with the confidence asked for."""
    error: tuple[float, ...]
    """Root mean square over examples of the relative error of its output."""
    gain: float = 1.0
    """Relative error of the model's output for each unit of error here."""

    @property
    def harm(self) -> tuple[float, ...]:
        """Predicted relative error of the model's output if this unit alone is reduced."""
        return tuple(self.gain * error for error in self.error)


def path(units: Sequence[Unit], limit: float = 1.0) -> list[Levels]:
    """Every point from the cheapest choice everywhere to all keys everywhere, as far as the average cost is in `limit`.

    The first point is there whatever the limit is.
    """
    levels = [0] * len(units)
    points = [tuple(levels)]
    budget = limit * len(units) + 1e-9
    while True:
        spent = sum(unit.costs[level] for unit, level in zip(units, levels, strict=True))
        best = (-1.0, 0, 0)
        for n, (unit, level) in enumerate(zip(units, levels, strict=True)):
            for higher in range(level + 1, len(unit.costs)):
                added = unit.costs[higher] - unit.costs[level]
                if spent + added > budget:
                    break
                gained = unit.harm[level] ** 2 - unit.harm[higher] ** 2
                # a choice that costs no more than this one is free
                slope = max(gained, 0.0) / added if added > 0 else math.inf
                if slope > best[0]:
                    best = (slope, n, higher)
        if best[0] < 0:
            return points
        levels[best[1]] = best[2]
        points.append(tuple(levels))


def first_that_meets(points: Sequence[Levels], meets: Callable[[Levels], bool]) -> Levels:
    """The earliest point of the path that meets the budget, by bisection; the last one is taken without asking.

    More keys need not always help, so this finds a point that meets the budget, after one that does not.
    """
    low, high = -1, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(points[middle]) else (middle, high)
    return points[high]


def smallest_with_mass(unit: Unit, budget: float) -> int:
    """The first choice whose mass is enough; the last one keeps all keys."""
    enough = (n for n, bound in enumerate(unit.mass_bound) if bound >= budget)
    return next(enough, len(unit.mass_bound) - 1)


def lower_bound(values: Tensor, confidence: float) -> Tensor:
    """What the mean of the distribution `values` [n, ...] in (-inf, 1] come from is at least, with this confidence.

    What is missing to 1 is small for most inputs and large for a few, so the mean of a sample is too good more often
    than not, and Student's interval alone holds far less often than it says.  The larger of two corrected ones is
    taken: Johnson's, for skewness (J. Am. Stat. Assoc. 73, 1978), and Cox's, as if the logarithm were normal (Land,
    Technometrics 14, 1972).  docs/calibrating.md has what was measured.
    """
    missing = 1 - values
    n = values.shape[0]
    if n < 3:
        return torch.where((missing == 0).all(0), 1.0, -torch.inf).to(values)
    t = _student(confidence, n - 1)
    mean, spread = missing.mean(0), missing.std(0)
    tiny = torch.finfo(values.dtype).tiny
    third = (missing - mean).pow(3).sum(0) * n / ((n - 1) * (n - 2))
    skewness = (third / spread.clamp(min=tiny).pow(3)).nan_to_num(0.0).clamp(min=0.0)
    johnson = mean + spread * (t / math.sqrt(n) + skewness * (2 * t * t + 1) / (6 * n))
    logarithm = missing.clamp(min=tiny).log()
    variance = logarithm.var(0)
    cox = (logarithm.mean(0) + variance / 2 + t * (variance / n + variance**2 / (2 * (n - 1))).sqrt()).exp()
    # exact zeros have no logarithm: they are no sample of such a distribution
    return 1 - torch.where((missing > 0).all(0), torch.maximum(johnson, cox), johnson)


def _student(confidence: float, freedom: int) -> float:
    """The quantile of Student's t, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while _student_below(high, freedom) < confidence and high < 1e12:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, freedom) < confidence else (low, middle)
    return high


def _student_below(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 and a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(1 + odd, freedom, 2):  # 2, 4, .. or 1, 3, .. below the degrees of freedom
        total += term
        term *= square * n / (n + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2
