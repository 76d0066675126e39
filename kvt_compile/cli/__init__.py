"""The command `kvt`: one verb a file, each a thin cover over a function of the library.

A user's mistake ends in one sentence on stderr and exit code 2; a traceback means a bug of ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import typer

from kvt_compile.cli.cache import app as cache
from kvt_compile.cli.calibrate import calibrate
from kvt_compile.cli.doctor import doctor
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.explain import explain
from kvt_compile.cli.look import look
from kvt_compile.cli.tune import tune
from kvt_compile.cli.verify import verify
from kvt_compile.kernels.disk.text import shown

app = typer.Typer(
    name="kvt",
    help="k-NN attention for any PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(explain)
app.command()(calibrate)
app.command()(look)
app.command()(verify)
app.command()(tune)
app.command()(doctor)
app.add_typer(cache, name="cache")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvt {version('kvt-compile')} (torch {version('torch')})")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `kvt ARGUMENTS` (default: the process's own) and ends the process: 0 done, 2 a user's mistake."""
    try:
        with _one_voice():
            app(args=None if arguments is None else list(arguments), prog_name="kvt")
    except UserError as error:
        typer.echo(f"kvt: {shown(str(error))}", err=True)
        raise SystemExit(2) from None


@contextmanager
def _one_voice() -> Iterator[None]:
    """Torch 2.14 logs the traceback of a model that fails; what there is to say of it is in our sentence."""

    def silent(record: logging.LogRecord) -> bool:
        return "TORCH_LOGS" in os.environ

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(silent)
    try:
        yield
    finally:
        log.removeFilter(silent)
