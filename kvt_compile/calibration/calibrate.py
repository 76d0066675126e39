"""A model, sample inputs and a budget -> a policy that meets the budget on inputs like these.

    data --cut at random--> measured part            checked part
                            curves of every k          the whole policy, run as it will run
                            -> candidates        ->    -> the first candidate whose margin meets the budget

Nothing the choice was made from says how good it is: that is measured on the other part, with a margin for how few
examples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import fx, nn

from kvt_compile.calibration.candidates import offered, placed
from kvt_compile.calibration.choose import Levels, Unit
from kvt_compile.calibration.data import CalibrationError, as_batches, split
from kvt_compile.calibration.facts import SiteCurve
from kvt_compile.calibration.judge import Judge, choose
from kvt_compile.calibration.measure import Choices, Runner, evaluating, measure
from kvt_compile.calibration.policy import CalibratedPolicy
from kvt_compile.calibration.progress import Progress, bar
from kvt_compile.calibration.selection_policy import CalibratedSelection
from kvt_compile.calibration.selections import policy_of
from kvt_compile.calibration.timing import times
from kvt_compile.calibration.units import units_of, with_gains, without_waste
from kvt_compile.config import OptionError, make_options
from kvt_compile.select.values import Selector
from kvt_compile.topk import TopK, validate

GRID: tuple[TopK, ...] = (
    0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


@overload
def calibrate(
    model: nn.Module, data: Any, *, mass: float | None = None, cosine: float | None = None, ratio: float | None = None,
    select: None = None, grid: Sequence[TopK] = GRID, holdout: float = 0.5, confidence: float = 0.95,
    batch_size: int = 16, progress: bool | Progress = False, **options: Any,
) -> CalibratedPolicy: ...  # fmt: skip


@overload
def calibrate(
    model: nn.Module, data: Any, *, mass: float | None = None, cosine: float | None = None, ratio: float | None = None,
    select: str | Selector | Sequence[str | Selector], grid: Any = GRID, holdout: float = 0.5,
    confidence: float = 0.95, batch_size: int = 16, progress: bool | Progress = False, **options: Any,
) -> CalibratedSelection: ...  # fmt: skip


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    mass: float | None = None,
    cosine: float | None = None,
    ratio: float | None = None,
    select: str | Selector | Sequence[str | Selector] | None = None,
    grid: Any = GRID,
    holdout: float = 0.5,
    confidence: float = 0.95,
    batch_size: int = 16,
    progress: bool | Progress = False,
    **options: Any,
) -> CalibratedPolicy | CalibratedSelection:
    """Chooses how many keys each attention of a model keeps, or which, for one of three budgets.

    Args:
        model: an `nn.Module`; it runs in evaluation mode without gradients and is left as it was.
        data: sample inputs: a tensor, a tuple of arguments or a mapping of keyword arguments with examples along the
            first dimension, or an iterable of these (for a loader of pairs: `(x for x, _ in loader)`).  8 examples at
            least; with 32 or more the margin is small.
        mass: every attention keeps this much of its attention mass, on average over inputs.  Mass is the sum of the
            dense softmax weights of the kept keys, averaged over heads and queries.
        cosine: the cosine between the model's output with the policy and with all keys is this, on average over inputs.
        ratio: the average over attentions of the share of keys that is kept; spent where it hurts least.
        select: "auto" to choose among windows, halos and regions in place of k, or the selections to choose from
            (values of `kvt_compile.select` or their texts); every key is always one of them.  What a choice costs is
            then the time of the attention's own kernel on this machine (for `ratio` still the share of the keys), and
            among the policies that keep the promise one that takes the least is looked for.  An attention whose
            tokens' places are not known stays dense.
        grid: what k is chosen from: shares in (0, 1], or numbers of keys; "all keys" is added.  With `select` it is
            where tokens stand, as for `rewrite`.
        holdout: share of the examples that is not measured on, and that the policy is checked on.
        confidence: of the margin: means over the checked examples must exceed the budget by as much as their spread
            leaves open (for mass, for all attentions together).
        batch_size: how many examples run at a time.
        progress: True for a bar on stderr, or a callable that is given (what, done, total).
        options: `include`, `exclude`, `prefix`, `lowering`, `channel_attention`, `batch_attention`,
            `unknown_attention`, `batch_dim` as for `rewrite`.

    Returns a `CalibratedPolicy`, a mapping that goes into `topk` of every way in, or with `select` a
    `CalibratedSelection`, one that goes into `select`.

    The promise is about inputs drawn as the sample was, and about the average over them: `policy.check.cosine_worst`
    says how bad single ones were.  It is not a statement about accuracy on a task.

    Raises CalibrationError for data or a budget that nothing can be calibrated with, OptionError for an option, and
    whatever the model raises on the data.
    """
    name, value = _budget(mass=mass, cosine=cosine, ratio=ratio)
    values = _grid(grid) if select is None else GRID
    choices: Choices = (lambda call: values) if select is None else offered(select)
    keep: dict[str, Any] = {"topk": 1.0} if select is None else {"select": placed}
    if select is not None and grid is not GRID:
        options["grid"] = grid
    _check_arguments(model, holdout, confidence, batch_size, options)
    measured, checked = split(as_batches(data), holdout, batch_size)
    with evaluating(model), torch.no_grad(), bar() if progress is True else nullcontext(progress or None) as shown:
        run = Runner(model, options, keep)
        curves = measure(run, measured, choices, _steps(shown, "measuring", len(measured)))
        if not curves:
            why = "; ".join(f"{path}: {reason}" for path, reason in run.left)
            raise CalibrationError(
                f"there is no attention to calibrate in {type(model).__name__}; "
                f"{why or 'kvt_compile.explain(model, ...) says why'}"
            )
        took = times(run, measured[0], curves, _steps(shown, "timing", len(curves))) if select is not None else {}
        every = units_of(curves, confidence, {} if name == "ratio" else took)
        if name != "mass":
            every = with_gains(every, run, measured[0], _steps(shown, "probing", len(every)))
        units = every if select is None else [without_waste(unit, name == "mass") for unit in every]
        judge = Judge(run, checked, units, confidence, _steps(shown, "checking", 0))
        levels = choose(name, value, units, judge)
        budget = name, value, confidence
        if select is None:
            return _policy(budget, values, units, levels, judge)
        return policy_of(budget, every, units, levels, judge, curves, took, run, measured[0])


def _policy(
    budget: tuple[str, float, float], grid: tuple[TopK, ...], units: Sequence[Unit], levels: Levels, judge: Judge
) -> CalibratedPolicy:
    check, masses = judge.outputs(levels), judge.masses(levels)
    sites = tuple(
        SiteCurve(unit.path, unit.keys, grid[level], unit.mass, unit.error, unit.harm, *masses[unit.path])
        for unit, level in zip(units, levels, strict=True)
    )
    return CalibratedPolicy(*budget, grid, sites, check, judge.trail())


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
