"""Options that several verbs take, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

SPEC_HELP = "timm:NAME, torchvision:NAME, transformers:MODEL_TYPE or path/to/file.py:factory"

Spec = Annotated[str, typer.Argument(metavar="SPEC", help=SPEC_HELP, show_default=False)]
Include = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Only modules whose path matches; repeat for several.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Not modules whose path matches; repeat for several.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Examples in the batch.", show_default="2")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images.", show_default="the model's own")]
Attn = Annotated[
    str | None,
    typer.Option(metavar="eager|sdpa", help="Which attention timm and transformers build.", show_default="theirs"),
]
Preload = Annotated[
    str | None,
    typer.Option(metavar="FILE", envvar="KVT_PRELOAD", help="A Python file to run before anything is imported."),
]
Select = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Which keys are kept, in place of --topk: 'window(13) | prefix'.", show_default="none"
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Where tokens stand, if the graph does not say it.", show_default="as read"),
]
BatchDim = Annotated[
    list[str] | None,
    typer.Option(
        metavar="AXIS",
        help="Which axis of the inputs is the batch, counted from 0; NAME=AXIS for one input, repeated for several.",
        show_default="not said",
    ),
]
