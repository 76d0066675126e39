"""Results of the GPU benchmark -> a table for a person, one JSON file for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu_plan import EAGER, MODEL_TARGET, OURS, SDPA, TOLERANT, Measured, Target, targets
from rich.table import Table
from rich.text import Text

RATIOS = ("time / sdpa", "tolerant / sdpa", "flex / time", "eager / time", "compiled / time", "memory / sdpa")


def table(results: Sequence[Measured], title: str) -> Table:
    """One row a cell: milliseconds, then ratios, each with its target beside it."""
    made = Table(title=title, title_justify="left")
    made.add_column("cell", no_wrap=True)
    for column in ("ours ms", "0.02 ms", "sdpa ms", "eager ms", *RATIOS):
        made.add_column(column, justify="right")
    for result in results:
        bars = {target.name: target for target in targets(result.cell)}
        ratios = result.ratios()
        times = [f"{result.ms[name]:.3f}" if name in result.ms else "-" for name in (OURS, TOLERANT, SDPA, EAGER)]
        made.add_row(str(result.cell), *times, *(_ratio(ratios.get(name), bars.get(name)) for name in RATIOS))
    return made


def _ratio(ratio: float | None, target: Target | None) -> Text:
    if ratio is None:
        return Text("-")
    if target is None:
        return Text(f"{ratio:.2f}")
    met = target.met(ratio)
    return Text(f"{ratio:.2f} {'ok' if met else 'NO'} {target.text()}", style="green" if met else "red")


def model_lines(models: Sequence[dict[str, Any]]) -> list[str]:
    """One line a model run."""
    lines = []
    for x in models:
        if "dropped" in x:
            lines.append(f"{x['what']}: {x['dropped']}")
        else:
            ratio = x["ours_ms"] / x["dense_ms"]
            verdict = "ok" if MODEL_TARGET.met(ratio) else "NO"
            lines.append(
                f"{x['what']}: {x['ours_ms']:.2f} ms, dense torch.compile {x['dense_ms']:.2f} ms: {ratio:.3f} "
                f"{verdict} {MODEL_TARGET.text()}"
            )
    return lines


def missing(results: Sequence[Measured]) -> list[str]:
    """Why numbers are absent, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result.dropped.items():
            reasons.setdefault(f"{name}: {reason}", []).append(str(result.cell))
    return [
        f"{reason} ({where[0] if len(where) == 1 else f'{len(where)} cells, first {where[0]}'})"
        for reason, where in reasons.items()
    ]


def write(path: Path, about: dict[str, Any], results: Sequence[Measured], models: Sequence[dict[str, Any]]) -> None:
    """Everything, over what the file held; called after every cell, so that a run cut short leaves what it has."""
    data = {**about, "cells": [x.to_dict() for x in results], "models": list(models)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)
