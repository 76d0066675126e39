"""Units, what was chosen of them and how long they took -> the policy of selections, timed as a whole."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping, Sequence

from kvt_compile.calibration.choose import Choice, Levels, Unit
from kvt_compile.calibration.data import Batch
from kvt_compile.calibration.facts import SelectionCurve
from kvt_compile.calibration.judge import Judge
from kvt_compile.calibration.measure import Curve, Name, Runner
from kvt_compile.calibration.selection_policy import CalibratedSelection
from kvt_compile.calibration.timing import speed


def policy_of(
    budget: tuple[str, float, float],
    every: Sequence[Unit],
    units: Sequence[Unit],
    levels: Levels,
    judge: Judge,
    curves: Sequence[Curve],
    took: Mapping[Name, Sequence[float]],
    run: Runner,
    batch: Batch,
) -> CalibratedSelection:
    """`every`: the units with all their choices; `units`: those that were chosen from, at `levels`.  The model is timed
    on the batch."""
    check, masses = judge.outputs(levels), judge.masses(levels)
    by_path: defaultdict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        by_path[curve.path].append(curve)
    sites = []
    for unit, reduced, level in zip(every, units, levels, strict=True):
        same = by_path[unit.path]

        def along(
            values: Mapping[Name, Sequence[float]], same: list[Curve] = same, unit: Unit = unit
        ) -> tuple[float, ...]:
            """Summed over the attentions of the module."""
            return tuple(
                sum(float(values[x.path, x.number][x.choices.index(choice)]) for x in same) for choice in unit.choices
            )

        kept = along({(x.path, x.number): (x.kept / len(same)).tolist() for x in same})
        sites.append(
            SelectionCurve(
                unit.path, unit.keys, same[0].grid, _text(reduced.choices[level]), tuple(map(_text, unit.choices)),
                along(took), kept, unit.mass, unit.error, unit.harm, *masses[unit.path],
            )
        )  # fmt: skip
    chosen = {glob.escape(site.path): site.select for site in sites}
    saved = sum(site.seconds[-1] - site.seconds[site.chosen] for site in sites)
    timed = speed(run, chosen, saved, batch)
    return CalibratedSelection(*budget, tuple(sites), check, timed, run.left, judge.trail())


def _text(choice: Choice) -> str | None:
    return choice if isinstance(choice, str) else None
