"""Candidates -> what they do to the model on the checked part, run as they will run; and the first that is good enough.

mass     enough on the measured part; then, on the checked part, whatever has too little gets the next choice
cosine   bisection along the path, with a margin for every candidate that it may look at
ratio    the last point of the path that the budget pays for
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvt_compile.calibration.choose import (
    Choice,
    Levels,
    Unit,
    first_that_meets,
    lower_bound,
    path,
    smallest_with_mass,
)
from kvt_compile.calibration.data import Batch, CalibrationError
from kvt_compile.calibration.facts import Check
from kvt_compile.calibration.measure import Runner, compare


class Judge:
    """Runs candidates on the checked part."""

    def __init__(
        self,
        run: Runner,
        batches: Sequence[Batch],
        units: Sequence[Unit],
        confidence: float,
        step: Callable[[], None],
    ) -> None:
        self._run, self._batches, self._units = run, batches, units
        self._confidence, self._step = confidence, step
        self.looks = 1
        self._exact = [run.dense(batch) for batch in batches]
        self._checks: dict[Levels, Check] = {}

    def _policy(self, levels: Levels) -> dict[str, Choice]:
        return {unit.path: unit.choices[level] for unit, level in zip(self._units, levels, strict=True)}

    def outputs(self, levels: Levels) -> Check:
        if levels not in self._checks:
            policy = self._policy(levels)
            cosines: list[Tensor] = []
            differences: list[Tensor] = []
            for batch, exact in zip(self._batches, self._exact, strict=True):
                found = compare(self._run.with_policy(batch, policy), exact)
                cosines.append(found[0])
                differences.append(found[1])
                self._step()
            cosine, error = torch.cat(cosines), torch.cat(differences)
            bound = float(lower_bound(cosine, 1 - (1 - self._confidence) / self.looks))
            self._checks[levels] = Check(
                len(cosine), float(cosine.mean()), bound, float(cosine.min()), float(error.mean())
            )
        return self._checks[levels]

    def masses(self, levels: Levels) -> dict[str, tuple[float, float]]:
        """path -> (mean mass, what it is at least), of the worst attention in each module."""
        policy = self._policy(levels)
        parts: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for batch in self._batches:
            for site, mass in self._run.mass_with_policy(batch, policy).items():
                parts[site].append(mass)
            self._step()
        each = 1 - (1 - self._confidence) / max(len(parts), 1)  # so that all hold together (Bonferroni)
        found: dict[str, tuple[float, float]] = {}
        for (name, _), values in parts.items():
            every = torch.cat(values)
            pair = float(every.mean()), float(lower_bound(every, each))
            found[name] = min(found.get(name, pair), pair, key=lambda pair: pair[1])
        return found

    def trail(self) -> tuple[tuple[float, float, float], ...]:
        """(average cost, mean cosine, relative error) of every candidate that was run, in rising order."""
        return tuple(sorted((self._cost(levels), c.cosine, c.error) for levels, c in self._checks.items()))

    def _cost(self, levels: Levels) -> float:
        costs = [unit.costs[level] for unit, level in zip(self._units, levels, strict=True)]
        return sum(costs) / len(costs)


def choose(name: str, value: float, units: Sequence[Unit], judge: Judge) -> Levels:
    """What each unit gets for a budget.  Raises CalibrationError for a ratio that no choice is small enough for."""
    match name:
        case "mass":
            return _enough_mass(units, value, judge)
        case "cosine":
            points = path(units)
            # the margin holds for every candidate that bisection may look at
            judge.looks = math.ceil(math.log2(len(points) + 1))
            return first_that_meets(points, lambda levels: judge.outputs(levels).cosine_bound >= value)
    points = path(units, value)
    if sum(unit.costs[0] for unit in units) / len(units) > value:
        least = sum(unit.costs[0] for unit in units) / len(units)
        raise CalibrationError(f"ratio {value:g} is less than the grid can give, which is {least:g}: extend the grid")
    return points[-1]


def _enough_mass(units: Sequence[Unit], value: float, judge: Judge) -> Levels:
    """Enough on the measured part; then, on the checked part, whatever has too little gets the next choice."""
    levels = [smallest_with_mass(unit, value) for unit in units]
    while True:
        bounds = judge.masses(tuple(levels))
        short = [n for n, unit in enumerate(units) if bounds[unit.path][1] < value]
        if not short:
            return tuple(levels)
        for n in short:
            levels[n] += 1  # the last choice keeps all keys, whose mass is 1
