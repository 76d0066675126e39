"""A model, sample inputs and a budget -> a policy that meets the budget on inputs like these.

    data --cut at random--> measured part            checked part
                            curves of every k          the whole policy, run as it will run
                            -> candidates        ->    -> the first candidate whose margin meets the budget

Nothing the choice was made from says how good it is: that is measured on the other part, with a margin for how few
examples there are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvt_compile.calibration.choose import Levels, Unit, first_that_meets, lower_bound, path, smallest_with_mass
from kvt_compile.calibration.data import Batch, CalibrationError, as_batches, split
from kvt_compile.calibration.facts import Check, SiteCurve
from kvt_compile.calibration.measure import Curve, Runner, compare, evaluating, measure
from kvt_compile.calibration.policy import CalibratedPolicy
from kvt_compile.calibration.progress import Progress, bar
from kvt_compile.config import OptionError, make_options
from kvt_compile.topk import TopK, resolve, validate

GRID: tuple[TopK, ...] = (
    0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    mass: float | None = None,
    cosine: float | None = None,
    ratio: float | None = None,
    grid: Sequence[TopK] = GRID,
    holdout: float = 0.5,
    confidence: float = 0.95,
    batch_size: int = 16,
    progress: bool | Progress = False,
    **options: Any,
) -> CalibratedPolicy:
    """Chooses how many keys each attention of a model keeps, for one of three budgets.

    Args:
        model: an `nn.Module`; it runs in evaluation mode without gradients and is left as it was.
        data: sample inputs: a tensor, a tuple of arguments or a mapping of keyword arguments with examples along the
            first dimension, or an iterable of these (for a loader of pairs: `(x for x, _ in loader)`).  8 examples at
            least; with 32 or more the margin is small.
        mass: every attention keeps this much of its attention mass, on average over inputs.  Mass is the sum of the
            dense softmax weights of the kept keys, averaged over heads and queries.
        cosine: the cosine between the model's output with the policy and with all keys is this, on average over inputs.
        ratio: the average over attentions of the share of keys that is kept; spent where it hurts least.
        grid: what k is chosen from: shares in (0, 1], or numbers of keys; "all keys" is added.
        holdout: share of the examples that is not measured on, and that the policy is checked on.
        confidence: of the margin: means over the checked examples must exceed the budget by as much as their spread
            leaves open (for mass, for all attentions together).
        batch_size: how many examples run at a time.
        progress: True for a bar on stderr, or a callable that is given (what, done, total).
        options: `include`, `exclude`, `lowering`, `channel_attention`, `batch_attention`, `unknown_attention` as for
            `rewrite`.

    Returns a `CalibratedPolicy`: a mapping that goes into `topk` of every way in.

    The promise is about inputs drawn as the sample was, and about the average over them: `policy.check.cosine_worst`
    says how bad single ones were.  It is not a statement about accuracy on a task.

    Raises CalibrationError for data or a budget that nothing can be calibrated with, OptionError for an option, and
    whatever the model raises on the data.
    """
    name, value = _budget(mass=mass, cosine=cosine, ratio=ratio)
    values = _grid(grid)
    _check_arguments(model, holdout, confidence, batch_size, options)
    measured, checked = split(as_batches(data), holdout, batch_size)
    with evaluating(model), torch.no_grad(), bar() if progress is True else nullcontext(progress or None) as shown:
        run = Runner(model, options)
        curves = measure(run, measured, values, _steps(shown, "measuring", len(measured)))
        if not curves:
            raise CalibrationError(
                f"there is no attention to calibrate in {type(model).__name__}; "
                "kvt_compile.explain(model, ...) says why"
            )
        units = _units(curves, values, confidence)
        if name != "mass":
            units = _with_gains(units, run, measured[0], values, _steps(shown, "probing", len(units)))
        judge = Judge(run, checked, units, values, confidence, _steps(shown, "checking", 0))
        levels = _choose(name, value, units, judge)
        return judge.policy(name, value, levels)


def _choose(name: str, value: float, units: Sequence[Unit], judge: Judge) -> Levels:
    match name:
        case "mass":
            return _enough_mass(units, value, judge)
        case "cosine":
            points = path(units)
            # the margin holds for every candidate that bisection may look at
            judge.looks = math.ceil(math.log2(len(points) + 1))
            return first_that_meets(points, lambda levels: judge.outputs(levels).cosine_bound >= value)
    points = path(units, value)
    if sum(unit.ratios[0] for unit in units) / len(units) > value:
        least = sum(unit.ratios[0] for unit in units) / len(units)
        raise CalibrationError(f"ratio {value:g} is less than the grid can give, which is {least:g}: extend the grid")
    return points[-1]


def _enough_mass(units: Sequence[Unit], value: float, judge: Judge) -> Levels:
    """Enough on the measured part; then, on the checked part, every attention that has too little gets the next k."""
    levels = [smallest_with_mass(unit, value) for unit in units]
    while True:
        bounds = judge.masses(tuple(levels))
        short = [n for n, unit in enumerate(units) if bounds[unit.path][1] < value]
        if not short:
            return tuple(levels)
        for n in short:
            levels[n] += 1  # the last k keeps all keys, whose mass is 1


class Judge:
    """Runs candidates on the checked part."""

    def __init__(
        self,
        run: Runner,
        batches: Sequence[Batch],
        units: Sequence[Unit],
        grid: Sequence[TopK],
        confidence: float,
        step: Callable[[], None],
    ) -> None:
        self._run, self._batches, self._units, self._grid = run, batches, units, grid
        self._confidence, self._step = confidence, step
        self.looks = 1
        self._exact = [run.dense(batch) for batch in batches]
        self._checks: dict[Levels, Check] = {}

    def _topk(self, levels: Levels) -> dict[str, TopK]:
        return {unit.path: self._grid[level] for unit, level in zip(self._units, levels, strict=True)}

    def outputs(self, levels: Levels) -> Check:
        if levels not in self._checks:
            topk = self._topk(levels)
            cosines: list[Tensor] = []
            differences: list[Tensor] = []
            for batch, exact in zip(self._batches, self._exact, strict=True):
                found = compare(self._run.with_policy(batch, topk), exact)
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
        topk = self._topk(levels)
        parts: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for batch in self._batches:
            for site, mass in self._run.mass_with_policy(batch, topk).items():
                parts[site].append(mass)
            self._step()
        each = 1 - (1 - self._confidence) / max(len(parts), 1)  # so that all hold together (Bonferroni)
        found: dict[str, tuple[float, float]] = {}
        for (name, _), values in parts.items():
            every = torch.cat(values)
            pair = float(every.mean()), float(lower_bound(every, each))
            found[name] = min(found.get(name, pair), pair, key=lambda pair: pair[1])
        return found

    def policy(self, name: str, value: float, levels: Levels) -> CalibratedPolicy:
        check, masses = self.outputs(levels), self.masses(levels)
        sites = tuple(
            SiteCurve(
                unit.path, unit.keys, self._grid[level], unit.mass, unit.error, unit.harm, *masses[unit.path]
            )
            for unit, level in zip(self._units, levels, strict=True)
        )  # fmt: skip
        trail = sorted((self._ratio(tried), c.cosine, c.error) for tried, c in self._checks.items())
        return CalibratedPolicy(name, value, self._confidence, tuple(self._grid), sites, check, tuple(trail))

    def _ratio(self, levels: Levels) -> float:
        ratios = [unit.ratios[level] for unit, level in zip(self._units, levels, strict=True)]
        return sum(ratios) / len(ratios)


def _units(curves: Sequence[Curve], grid: Sequence[TopK], confidence: float) -> list[Unit]:
    """Curves of one module become one unit: the least mass, the largest error."""
    each = 1 - (1 - confidence) / len(curves)
    by_path: defaultdict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        by_path[curve.path].append(curve)
    units = []
    for name, same in by_path.items():
        keys = max(curve.keys for curve in same)
        units.append(
            Unit(
                name,
                keys,
                tuple(resolve(k, keys) / keys for k in grid),
                tuple(torch.stack([curve.mass.mean(0) for curve in same]).amin(0).tolist()),
                tuple(torch.stack([lower_bound(curve.mass, each) for curve in same]).amin(0).tolist()),
                tuple(torch.stack([curve.error.square().mean(0).sqrt() for curve in same]).amax(0).tolist()),
            )
        )
    return units


def _with_gains(
    units: Sequence[Unit], run: Runner, probe: Batch, grid: Sequence[TopK], step: Callable[[], None]
) -> list[Unit]:
    """Reduces one unit at a time and sees what becomes of the model's output."""
    exact = run.dense(probe)
    gained = []
    for unit in units:
        # where the error is large enough to be seen, and not as large as with one key
        level = next((n for n, error in enumerate(unit.error) if 0 < error <= 0.3), 0)
        _, error = compare(run.with_policy(probe, {unit.path: grid[level]}), exact)
        size = unit.error[level]
        gained.append(replace(unit, gain=math.sqrt(float(error.square().mean())) / size if size > 0 else 0.0))
        step()
    return gained


def _steps(shown: Progress | None, what: str, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if shown is not None:
            shown(what, done, max(total, done))

    return step


def _budget(**given: float | None) -> tuple[str, float]:
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        found = " and ".join(chosen) if chosen else "none"
        raise CalibrationError(f"give one budget of mass, cosine and ratio (found {found})")
    ((name, value),) = chosen.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise CalibrationError(f"{name} is {value!r}, expected a number in (0, 1]")
    return name, float(value)


def _grid(grid: Sequence[TopK]) -> tuple[TopK, ...]:
    """In rising order, ending with all keys."""
    if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid:
        raise CalibrationError(f"grid is {grid!r}, expected shares of the keys or numbers of keys to choose from")
    for k in grid:
        validate(k)
    if len({type(k) for k in grid}) > 1:
        raise CalibrationError(f"grid mixes shares and numbers of keys, whose order depends on the input: {grid!r}")
    rising: tuple[TopK, ...] = tuple(sorted(set(grid)))
    return rising if rising[-1] == 1.0 and isinstance(rising[-1], float) else (*rising, 1.0)


def _check_arguments(
    model: Any, holdout: float, confidence: float, batch_size: int, options: Mapping[str, Any]
) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise TypeError(f"calibrate takes the nn.Module as it was written, got {type(model).__name__}")
    for name in ("topk", "force_rewrite"):
        if name in options:
            raise OptionError(f"{name} is what calibrate chooses; it cannot be given")
    make_options(options)
    for name, share in (("holdout", holdout), ("confidence", confidence)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise CalibrationError(f"{name} is {share!r}, expected a number between 0 and 1")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CalibrationError(f"batch_size is {batch_size!r}, expected an int of at least 1")
