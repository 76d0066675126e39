"""`kvt doctor`: what this machine can do, and whether everything promised works."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Annotated

import typer

import kvt_compile.doctor
from kvt_compile.cli.busy import busy
from kvt_compile.doctor import Diagnosis
from kvt_compile.kernels.disk.text import shown

MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "failed": ("✗", "red")}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a list.")] = False,
) -> None:
    """Say what this machine can do, and test every way of computing k-NN attention against the reference.

    Ends with code 1 when something promised does not work.
    """
    with busy("looking around"), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is in the diagnosis
        diagnosis = kvt_compile.doctor.examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        _print(diagnosis)
    raise typer.Exit(0 if diagnosis.healthy else 1)


def _print(diagnosis: Diagnosis) -> None:
    width = max(len(check.name) for check in diagnosis.checks)
    for check in diagnosis.checks:
        mark, color = MARKS[check.status]
        typer.secho(f"{mark} ", fg=color, nl=False)
        typer.echo(f"{check.name:{width}}  {shown(check.text)}")
        if check.remedy:
            typer.echo(f"{'':{width + 2}}  {shown(check.remedy)}")
    failed = [check.name for check in diagnosis.checks if check.status == "failed"]
    typer.echo(f"\n{', '.join(failed)}: not working" if failed else "\nEverything that is promised works.")
