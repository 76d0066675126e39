"""`kvt look SPEC --image photo.jpg --out DIR`: figures of which keys each query keeps, as files."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import kvt_compile
from kvt_compile.cli.busy import busy
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.explain import attention_named, build, run_once
from kvt_compile.cli.options import Attn, Grid, ImageSize, Include, Preload, Select, Spec
from kvt_compile.cli.topk import keeping, parse_grid
from kvt_compile.cli.weights import load_weights
from kvt_compile.look.picture import ImageError, open_image


def look(
    spec: Spec,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the figures; made if it is not there.")],
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="A photograph to look at.", show_default="random inputs")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A state_dict (.pt, .pth, .safetensors) to load.", show_default="random"),
    ] = None,
    topk: Annotated[
        list[str] | None, typer.Option(metavar="K", help="Keys kept per query, as for kvt explain.", show_default="0.5")
    ] = None,
    select: Select = None,
    site: Include = None,
    query: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUERY",
            help="Whose keys to show: cls, center, a token's number, or ROW,COLUMN of a patch; repeat for several.",
            show_default="center",
        ),
    ] = None,
    grid: Grid = None,
    prefix: Annotated[
        int | None, typer.Option(min=0, help="Tokens before the patches (CLS, registers).", show_default="found out")
    ] = None,
    image_size: ImageSize = None,
    attn: Attn = None,
    preload: Preload = None,
) -> None:
    """Draw what attention keeps: kept keys over the image, mass inside the top k, distance of the kept keys.

    The model has random weights unless --weights names some (a factory in a .py file can load its own).
    """
    folder = _folder(out)
    chosen = keeping(topk, select)
    places: dict[str, Any] = {} if grid is None else {"grid": parse_grid(grid)}
    queries = [parse_query(text) for text in query or ["center"]]
    photo = _photo(image)
    with busy(f"looking at {spec}"), contextlib.redirect_stdout(sys.stderr):
        subject = build(spec, 1 if _is_named(spec) else None, image_size, attention_named(attn), preload)
        model = subject.model.eval()
        if weights is not None:
            load_weights(model, weights)
        inputs = subject.args if photo is None else photo
        try:
            figures = kvt_compile.visualize(
                model, inputs, site=site, query=queries, prefix=prefix, kwargs=subject.kwargs, **places, **chosen
            )
        except (ValueError, ImportError) as error:
            if not isinstance(error, kvt_compile.OptionError | ImageError) and error.__traceback__ is not None:
                run_once(subject)
            raise UserError(str(error)) from error
        except Exception:
            run_once(subject)  # a model that fails by itself is the user's to mend
            raise
        folder.mkdir(exist_ok=True)
        try:
            paths = figures.save(folder)
        except OSError as error:
            raise UserError(f"--out: cannot write into {out!r}: {error.strerror or error}") from error
    for path in paths:
        typer.echo(str(path))


def parse_query(text: str) -> int | str | tuple[int, int]:
    """`cls`, `center`, `17` or `3,4`.  Raises UserError."""
    if text in ("cls", "center"):
        return text
    if re.fullmatch(r"\d+", text):
        return int(text)
    if found := re.fullmatch(r"(\d+)\s*,\s*(\d+)", text):
        return int(found[1]), int(found[2])
    raise UserError(f"--query {text!r} is not cls, center, a token's number or ROW,COLUMN")


def _folder(out: str) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {out!r} is a file; name a folder")
    if not folder.parent.is_dir():
        raise UserError(f"--out: there is no folder {str(folder.parent)!r} to make {folder.name!r} in")
    return folder


def _photo(image: str | None) -> Any:
    if image is None:
        return None
    try:
        return open_image(image)
    except ImageError as error:
        raise UserError(f"--image: {error}") from error


def _is_named(spec: str) -> bool:
    """Whether SPEC is a library's model, of which one example is enough; a factory decides its own batch."""
    return ".py:" not in spec
