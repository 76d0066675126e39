"""`kvt verify SPEC`: whether k-NN attention with every key is the dense model, attention by attention."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvt_compile
from kvt_compile.cli.busy import busy
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.explain import attention_named, build
from kvt_compile.cli.options import Attn, Batch, BatchDim, Exclude, ImageSize, Include, Preload, Spec
from kvt_compile.cli.subject import Subject
from kvt_compile.cli.topk import parse_batch_dim
from kvt_compile.cli.weights import load_weights


def verify(
    spec: Spec,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A state_dict (.pt, .pth, .safetensors) to load.", show_default="random"),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="The model in training mode (without dropout) instead of evaluation.")
    ] = False,
    inference: Annotated[
        bool, typer.Option("--inference", help="Without gradients: outputs alone, as the model runs in use.")
    ] = False,
    batch_dim: BatchDim = None,
    include: Include = None,
    exclude: Exclude = None,
    lowering: Annotated[str, typer.Option(metavar="NAME", help="How sites are computed.")] = "auto",
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the file that reproduces a failure.")] = ".",
    batch: Batch = None,
    image_size: ImageSize = None,
    attn: Attn = None,
    preload: Preload = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check that k-NN attention with every key is the dense model: outputs, gradients, and each attention alone.

    Budgets come from the model's own distance to float64. Ends with code 1 where an attention is over its budget, or
    torch would run it dense without a word.
    """
    if not Path(out).is_dir():
        raise UserError(f"--out: there is no folder {out!r}; make it first")
    chosen: dict[str, Any] = {"lowering": lowering, "reproduce_in": out}
    chosen |= {key: tuple(value) for key, value in (("include", include), ("exclude", exclude)) if value}
    chosen |= {} if batch_dim is None else {"batch_dim": parse_batch_dim(batch_dim)}
    # what a model prints while it is built does not belong into our output
    with busy(f"verifying {spec}"), contextlib.redirect_stdout(sys.stderr):
        subject = build(spec, batch, image_size, attention_named(attn), preload)
        if weights is not None:
            load_weights(subject.model, weights)
        found = _verify(subject, train, inference, chosen)
    if subject.note:
        typer.echo(f"kvt: {subject.note}", err=True)
    if as_json:
        typer.echo(json.dumps({"spec": spec, **found.to_dict()}, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.ok else 1)


def _verify(subject: Subject, train: bool, inference: bool, chosen: dict[str, Any]) -> kvt_compile.Verification:
    with torch.set_grad_enabled(not inference):
        try:
            return kvt_compile.verify(subject.model.train(train), *subject.args, **chosen, **subject.kwargs)
        except (kvt_compile.VerificationError, kvt_compile.OptionError) as error:
            raise UserError(str(error)) from error
