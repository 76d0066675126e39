"""`kvt tune SPEC` or `kvt tune --shape B,H,Nq,Nk,D`: measures block sizes on this machine's GPU, ahead of time."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvt_compile.cli.errors import UserError
from kvt_compile.cli.explain import attention_named, build, run_once
from kvt_compile.cli.options import SPEC_HELP, Attn, Batch, ImageSize, Preload
from kvt_compile.cli.topk import parse_topk
from kvt_compile.cli.tuning_progress import Shown
from kvt_compile.config import OptionError
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.tune.progress import Step
from kvt_compile.kernels.tune.tuner import process_tuner
from kvt_compile.tuning import Shape, tune_model, tune_shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def tune(
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help=SPEC_HELP, show_default=False)] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="B,H,Nq,Nk,D", help="One attention instead of a model.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Of the shape's tensors (default bfloat16); of a model's automatic mixed precision (default: none).",
            show_default=False,
        ),
    ] = None,
    topk: Annotated[
        list[str] | None,
        typer.Option(metavar="K", help="Keys kept per query, as for explain.", show_default="0.5"),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="With --shape: the score expression explain shows, such as 'where(le(j, i), 0.125*s, -oo)'.",
            show_default="s / sqrt(D)",
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="The backward too.")] = False,
    batch: Batch = None,
    image_size: ImageSize = None,
    attn: Attn = None,
    preload: Preload = None,
) -> None:
    """Measure block sizes for the kernels of a model, or of one shape, on this machine's GPU, and keep the best.

    Every process of this machine then uses them (options={"autotune": "cached"}, the default). Use the shapes and the
    batch of real use: results hold for a class of shapes.
    """
    if (spec is None) == (shape is None):
        raise UserError("give either SPEC (a model) or --shape B,H,Nq,Nk,D (one attention)")
    precision = _dtype(dtype)
    wanted = parse_topk(topk or ["0.5"])
    if shape is not None:
        if given := [name for name, x in (("--batch", batch), ("--image-size", image_size), ("--attn", attn)) if x]:
            raise UserError(f"{given[0]} is about a model; --shape holds all sizes")
        one = _shape(shape, precision or torch.bfloat16, wanted, score)
        device = gpu()
        with Shown() as shown:
            finished = tune_shape(one, device, backward=train, progress=shown)
    else:
        assert spec is not None
        if score is not None:
            raise UserError("--score goes with --shape; a model has its own")
        attention = attention_named(attn)
        device = gpu()
        with contextlib.redirect_stdout(sys.stderr), Shown() as shown:
            subject = build(spec, batch, image_size, attention, preload)
            try:
                finished = tune_model(
                    subject.model, subject.args, subject.kwargs, device, options={"topk": wanted},
                    autocast=None if precision is torch.float32 else precision, backward=train, progress=shown,
                )  # fmt: skip
            except OptionError as error:
                raise UserError(str(error)) from error
            except Exception:
                subject.model.cpu()
                run_once(subject)  # a model that fails by itself is the user's to mend
                raise
    _print(finished)


def gpu() -> torch.device:
    """The device to measure on."""
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no GPU here, and block sizes are measured on the GPU they are for; run "
            "this on a machine with one, or bring its results here with: kvt cache import FILE"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {name!r}")
    return None if name is None else DTYPES[name]


def _shape(text: str, dtype: torch.dtype, topk: Any, score: str | None) -> Shape:
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or min(numbers) < 1:
        raise UserError(f"--shape {text!r} is not five sizes B,H,Nq,Nk,D such as 128,12,197,197,64")
    if not isinstance(topk, int | float):
        raise UserError("--shape takes one --topk, a count or a ratio")
    batch, heads, queries, keys, head_dim = numbers
    shape = Shape(batch, heads, queries, keys, head_dim, dtype, topk, score)
    try:
        shape.captured(torch.device("meta"))
    except (ValueError, language.ScoreSyntaxError) as error:
        raise UserError(f"--score: {error}") from None
    return shape


def _print(finished: list[Step]) -> None:
    if not finished:
        typer.echo(
            "nothing was measured: results for these shapes are there already (kvt cache list), or the kernels that "
            "run here have no block sizes to choose"
        )
        return
    table = Table(title=finished[0].key.device, title_justify="left")
    for column in ("kernel", "shapes", "block sizes", "ms", "tried"):
        table.add_column(column, justify="right" if column in ("ms", "tried") else "left")
    for step in finished:
        assert step.winner is not None
        blocks = " ".join(f"{name}={value}" for name, value in step.winner.items())
        table.add_row(step.key.part, str(step.key.shape), blocks, f"{step.milliseconds:.3f}", str(step.total))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    typer.echo(f"kept in {process_tuner().store.folder}")
