"""`kvt explain SPEC`: which attentions a model has, what k-NN attention makes of each, what is left alone and why."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvt_compile
from kvt_compile.cli.busy import busy
from kvt_compile.cli.errors import UserError, in_one_line
from kvt_compile.cli.files import run_file
from kvt_compile.cli.options import Attn, Batch, BatchDim, Exclude, Grid, ImageSize, Include, Preload, Select, Spec
from kvt_compile.cli.spec import load
from kvt_compile.cli.subject import Attention, Subject, Wanted
from kvt_compile.cli.topk import keeping, parse_batch_dim, parse_grid
from kvt_compile.report.report import Report


def explain(
    spec: Spec,
    topk: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K",
            help="Keys kept per query: a count, a ratio in (0, 1], or none; PATTERN=K for the modules that match, and "
            "repeated for several.",
            show_default="0.5",
        ),
    ] = None,
    select: Select = None,
    grid: Grid = None,
    prefix: Annotated[
        int | None, typer.Option(min=0, help="How many tokens stand before the grid.", show_default="as read")
    ] = None,
    batch_dim: BatchDim = None,
    include: Include = None,
    exclude: Exclude = None,
    force_rewrite: Annotated[
        bool, typer.Option("--force-rewrite", help="Rewrite also where K keeps every key.")
    ] = False,
    lowering: Annotated[str, typer.Option(metavar="NAME", help="How sites are computed.")] = "auto",
    batch: Batch = None,
    image_size: ImageSize = None,
    attn: Attn = None,
    train: Annotated[bool, typer.Option("--train", help="The model in training mode instead of inference.")] = False,
    preload: Preload = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    source: Annotated[
        str | None,
        typer.Option(metavar="SITE", help="Print the code generated for a site (its module path) instead of a table."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="With --source: for cpu, sm_80, sm_90, sm_100 or gfx942, not this machine."
        ),
    ] = None,
    canonical: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="Print what the finder read at a site, or at a softmax that is left alone (its module path or a "
            "pattern): the values around it, one a line.",
        ),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print the graph around every rewritten site, before and after.")
    ] = False,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write everything there is to see as one HTML page.")
    ] = None,
    graph: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the model's graph as an SVG picture.")
    ] = None,
) -> None:
    """Show every attention of a model: what would be rewritten, with which k, and why the rest is left alone.

    The model is built with random weights and captured; nothing is changed, compiled or downloaded.
    """
    chosen: dict[str, Any] = {"force_rewrite": force_rewrite, "lowering": lowering}
    chosen |= keeping(topk, select)
    places = {"grid": parse_grid(grid), "prefix": prefix, "batch_dim": parse_batch_dim(batch_dim)}
    chosen |= {key: value for key, value in places.items() if value is not None}
    chosen |= {key: tuple(value) for key, value in (("include", include), ("exclude", exclude)) if value}
    prints = {"--source": source is not None, "--canonical": canonical is not None, "--json": as_json, "--diff": diff}
    if sum(prints.values()) > 1:
        given = " and ".join(name for name, asked in prints.items() if asked)
        raise UserError(f"{given} each print something else: give one of them")
    if target is not None and source is None:
        raise UserError("--target goes with --source: it says for which machine the code is printed")
    for file in (html, graph):
        if file is not None:
            _check_folder(file)
    # what a model prints while it is built does not belong into our output
    with busy(f"reading {spec}"), contextlib.redirect_stdout(sys.stderr):
        subject = build(spec, batch, image_size, attention_named(attn), preload)
        report = _explain(subject, train, chosen)
    if subject.note:
        typer.echo(f"kvt: {subject.note}", err=True)
    if html is not None:
        _write(html, partial(report.to_html, title=spec))
    if graph is not None:
        _write(graph, report.to_svg)
    if source is not None:
        typer.echo(_source(report, source, target))
    elif canonical is not None:
        typer.echo(_canonical(report, canonical))
    elif diff:
        _print_diff(report)
    elif as_json:
        typer.echo(json.dumps({"spec": spec, "options": _plain(chosen), **report.to_dict()}, indent=2))
    else:
        _print(report)


def attention_named(name: str | None) -> Attention | None:
    match name:
        case None | "eager" | "sdpa":
            return name
    raise UserError(f"--attn is 'eager' or 'sdpa', not {name!r}")


def build(spec: str, batch: int | None, image_size: int | None, attn: Attention | None, preload: str | None) -> Subject:
    """What SPEC names, after the file of --preload was run."""
    if preload:
        run_file(preload, "--preload")
    return load(spec, Wanted(batch, image_size, attn))


def _explain(subject: Subject, train: bool, chosen: dict[str, Any]) -> Report:
    model = subject.model.train(train)
    with torch.set_grad_enabled(train):
        try:
            return kvt_compile.explain(model, *subject.args, **chosen, **subject.kwargs)
        except kvt_compile.OptionError as error:
            raise UserError(str(error)) from error
        except Exception:
            run_once(subject)  # a model that fails by itself is the user's to mend
            raise


def run_once(subject: Subject) -> None:
    """Raises UserError where the model itself fails on its inputs."""
    try:
        subject.model(*subject.args, **subject.kwargs)
    except Exception as error:
        raise UserError(f"the model itself fails on these inputs: {in_one_line(error)}") from error


def _check_folder(path: str) -> None:
    """Before a model is built for half a minute in vain."""
    if not Path(path).parent.is_dir():
        raise UserError(f"cannot write {path!r}: there is no folder {str(Path(path).parent)!r}; make it first")


def _write(path: str, write: Callable[[str], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise UserError(str(error)) from error
    typer.echo(f"kvt: wrote {path}", err=True)


def _source(report: Report, site: str, target: str | None) -> str:
    try:
        return report.kernel_source(site, target)
    except LookupError as error:
        raise UserError(f"--source: {error}") from error


def _canonical(report: Report, site: str) -> str:
    try:
        return report.canonical(site)
    except LookupError as error:
        raise UserError(f"--canonical: {error}") from error


def _plain(chosen: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def _print_diff(report: Report) -> None:
    text = report.diff or "no site is rewritten, so the graph stays as it is"
    for line in text.splitlines():
        color = {"-": "red", "+": "green", "@": "cyan"}.get(line[:1])
        typer.secho(line, fg=color)  # in colour on a terminal, plain in a pipe


def _print(report: Report) -> None:
    if not sys.stdout.isatty():
        typer.echo(str(report))
        return
    from rich.console import Console

    Console().print(report)
