"""`kvt calibrate SPEC`: which keys each attention of a model can do without, measured on sample inputs."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvt_compile
from kvt_compile.calibration.data import Batch
from kvt_compile.cli.data import read
from kvt_compile.cli.errors import UserError, in_one_line
from kvt_compile.cli.explain import attention_named, build
from kvt_compile.cli.options import Attn, BatchDim, Exclude, Grid, ImageSize, Include, Preload, Spec
from kvt_compile.cli.subject import Subject
from kvt_compile.cli.topk import parse_batch_dim, parse_grid
from kvt_compile.cli.weights import load_weights

Policy = kvt_compile.CalibratedPolicy | kvt_compile.CalibratedSelection


def calibrate(
    spec: Spec,
    mass: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Every attention keeps this much of its mass, e.g. 0.99.")
    ] = None,
    cosine: Annotated[
        float | None, typer.Option(metavar="COSINE", help="The output keeps this cosine with the dense model's.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(metavar="SHARE", help="This share of the keys is kept, where it hurts least.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder of images, or an .npz file with arrays named as the model's arguments.",
            show_default="the inputs of the factory",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="A state_dict (.pt, .pth, .safetensors) to load first.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the policy as JSON.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Write the curves as .png, .svg or .pdf.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples to use at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that run at a time.")] = 16,
    holdout: Annotated[float, typer.Option(help="Share of the examples that the policy is checked on.")] = 0.5,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|TEXT",
            help="Choose among selections in place of k, by time: auto, or 'window(13) | prefix'; repeat for several.",
            show_default="none",
        ),
    ] = None,
    grid: Grid = None,
    batch_dim: BatchDim = None,
    include: Include = None,
    exclude: Exclude = None,
    image_size: ImageSize = None,
    attn: Attn = None,
    preload: Preload = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Choose k, or a selection, for each attention of a model by measurement: for --mass, for --cosine or for --ratio.

    Half of the examples are measured on; the choice is checked on the others, with a margin.
    """
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{option}: there is no folder {str(Path(path).parent)!r}")
    settings: dict[str, Any] = {"mass": mass, "cosine": cosine, "ratio": ratio}
    settings |= {"batch_size": batch_size, "holdout": holdout}
    settings |= {key: tuple(value) for key, value in (("include", include), ("exclude", exclude)) if value}
    settings |= {} if batch_dim is None else {"batch_dim": parse_batch_dim(batch_dim)}
    settings |= {} if not select else {"select": select[0] if select == ["auto"] else select}
    if grid is not None:
        if not select:
            raise UserError("--grid goes with --select: it says where tokens stand")
        settings["grid"] = parse_grid(grid)
    with contextlib.redirect_stdout(sys.stderr):  # what a model prints does not belong into our output
        subject = build(spec, None, image_size, attention_named(attn), preload)
        if weights is not None:
            load_weights(subject.model, weights)
        elif ".py:" not in spec:
            typer.echo(f"kvt: {spec} has random weights, so this says little; give --weights or a factory", err=True)
        inputs = _inputs(subject, data, examples, spec)
        policy = _calibrate(subject, inputs, settings)
    if out is not None:
        try:
            policy.save(out)
        except OSError as error:
            raise UserError(f"--out: {out!r} cannot be written: {in_one_line(error)}") from error
    if plot is not None:
        _plot(policy, plot)
    if as_json:
        typer.echo(json.dumps(policy.to_dict(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(policy)
    else:
        typer.echo(str(policy))


def _inputs(subject: Subject, data: str | None, examples: int, spec: str) -> Batch:
    if data is not None:
        return Batch(*read(data, subject, examples))
    if ".py:" not in spec:
        raise UserError(
            "--data is missing: a folder of images, or an .npz file with arrays named as the model's arguments"
        )
    return Batch(subject.args, dict(subject.kwargs))


def _calibrate(subject: Subject, batch: Batch, settings: dict[str, Any]) -> Policy:
    model = subject.model.eval()
    try:
        policy: Policy = kvt_compile.calibrate(model, [batch], progress=True, **settings)
        return policy
    except (kvt_compile.CalibrationError, kvt_compile.OptionError, kvt_compile.SelectionError) as error:
        raise UserError(str(error)) from error
    except Exception:
        try:  # a model that fails by itself is the user's to mend
            with torch.no_grad():
                model(*batch.args, **batch.kwargs)
        except Exception as error:
            raise UserError(f"the model itself fails on these inputs: {in_one_line(error)}") from error
        raise


def _plot(policy: Policy, name: str) -> None:
    try:
        policy.plot().savefig(name, dpi=150)
    except ImportError as error:
        raise UserError("--plot needs matplotlib; install it with: pip install matplotlib") from error
    except (ValueError, OSError) as error:  # a format matplotlib does not write
        raise UserError(f"--plot: {in_one_line(error)}") from error
