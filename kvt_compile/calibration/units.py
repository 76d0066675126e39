"""Curves -> units: what gets one choice, with what each choice costs and does.

The curves of one module become one unit: the least mass, the largest error, the sum of the times.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from kvt_compile.calibration.choose import Unit, lower_bound
from kvt_compile.calibration.data import Batch
from kvt_compile.calibration.measure import Curve, Name, Runner, Step, compare
from kvt_compile.topk import resolve


def units_of(curves: Sequence[Curve], confidence: float, took: Mapping[Name, Sequence[float]]) -> list[Unit]:
    """One for each module, in the order the model runs them.  `took`: seconds along each curve's choices, where what a
    choice costs is time; else it is the share of the keys that is kept."""
    each = 1 - (1 - confidence) / len(curves)
    longest = sum(max(seconds) for seconds in took.values())
    by_path: defaultdict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        by_path[curve.path].append(curve)
    units = []
    for name, same in by_path.items():
        # attentions of one module may stand on other grids: what all of them can choose
        choices = [x for x in same[0].choices if all(x in curve.choices for curve in same)]
        at = [[curve.choices.index(x) for x in choices] for curve in same]
        keys = max(curve.keys for curve in same)
        kept = torch.stack([curve.kept[places] for curve, places in zip(same, at, strict=True)]).mean(0).tolist()
        shares = [n if isinstance(x, str) else resolve(x, keys) / keys for x, n in zip(choices, kept, strict=True)]
        seconds = [
            sum(took[curve.path, curve.number][places[n]] for curve, places in zip(same, at, strict=True))
            for n in range(len(choices) if took else 0)
        ]
        mass = [curve.mass[:, places] for curve, places in zip(same, at, strict=True)]
        error = [curve.error[:, places] for curve, places in zip(same, at, strict=True)]
        units.append(
            Unit(
                name,
                keys,
                tuple(choices),
                tuple(x / longest for x in seconds) if took else tuple(shares),
                tuple(torch.stack([x.mean(0) for x in mass]).amin(0).tolist()),
                tuple(torch.stack([lower_bound(x, each) for x in mass]).amin(0).tolist()),
                tuple(torch.stack([x.square().mean(0).sqrt() for x in error]).amax(0).tolist()),
            )
        )
    return units


def with_gains(units: Sequence[Unit], run: Runner, probe: Batch, step: Step) -> list[Unit]:
    """Reduces one unit at a time and sees what becomes of the model's output."""
    exact = run.dense(probe)
    gained = []
    for unit in units:
        # where the error is large enough to be seen, and not as large as with one key
        level = next((n for n, error in enumerate(unit.error) if 0 < error <= 0.3), 0)
        _, error = compare(run.with_policy(probe, {unit.path: unit.choices[level]}), exact)
        size = unit.error[level]
        gained.append(replace(unit, gain=math.sqrt(float(error.square().mean())) / size if size > 0 else 0.0))
        step()
    return gained


def without_waste(unit: Unit, by_mass: bool) -> Unit:
    """The choices in the order of their costs, without those that cost as much as every key or more, and those that a
    cheaper one does better than: in mass, or in error."""
    harm = [1 - x for x in unit.mass_bound] if by_mass else unit.error
    *others, every = range(len(unit.choices))
    kept: list[int] = []
    for n in sorted(others, key=lambda n: unit.costs[n]):
        if unit.costs[n] < unit.costs[every] and all(harm[n] < harm[m] for m in kept):
            kept.append(n)
    kept.append(every)

    def of(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(values[n] for n in kept)

    return replace(
        unit,
        choices=tuple(unit.choices[n] for n in kept),
        costs=of(unit.costs),
        mass=of(unit.mass),
        mass_bound=of(unit.mass_bound),
        error=of(unit.error),
    )
