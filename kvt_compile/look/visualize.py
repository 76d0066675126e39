"""`visualize(model, image)`: a model and an image (or any inputs) -> figures of what its attention keeps."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kvt_compile.look import draw
from kvt_compile.look.measure import SiteMeasures, measure
from kvt_compile.look.picture import open_image, picture, prepare
from kvt_compile.look.tokens import Tokens, infer_tokens
from kvt_compile.observe import AttentionCall, SiteCall, observe
from kvt_compile.rewrite import RewriteResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Query = int | str | tuple[int, int]
MOST_SITES = 6
"""Rows of the figure of kept keys where no site is asked for: spread evenly over the model."""
MOST_HEADS = 12


@dataclass(frozen=True)
class Figures:
    """What `visualize` returns."""

    kept: dict[str, Figure]
    """Query as it was asked for (`center`, `17`, `3, 4`) -> which keys it keeps, for each site and head."""
    mass: Figure
    """Attention mass inside the top k as k grows, for each site."""
    distance: Figure | None
    """Distance of the kept keys, for each site and head; None where tokens have no place."""
    sites: tuple[SiteMeasures, ...] = field(repr=False)
    """The numbers behind them."""

    def __iter__(self) -> Iterator[tuple[str, Figure]]:
        """(file name without its ending, figure)"""
        for query, figure in self.kept.items():
            yield f"kept_{query.replace(', ', '_')}", figure
        yield "mass", self.mass
        if self.distance is not None:
            yield "distance", self.distance

    def save(self, folder: str | PathLike[str], *, ending: str = "png", dpi: int = 150) -> list[Path]:
        """Writes every figure into an existing folder and returns the paths.  Raises OSError where it cannot."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}; make it first")
        paths = []
        for name, figure in self:
            path = Path(folder, f"{name}.{ending}")
            part = path.with_name(f".part-{path.name}")  # renamed when it is whole
            try:
                figure.savefig(part, dpi=dpi)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            paths.append(path)
        return paths


def visualize(
    model: nn.Module | ExportedProgram | RewriteResult,
    image_or_inputs: Any,
    *,
    site: str | Sequence[str] | None = None,
    query: Query | list[Query] = "center",
    prefix: int | None = None,
    grid: tuple[int, int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Figures:
    """Runs a model once, without gradients, and draws what its attention keeps.

    Args:
        model: a model, or what `rewrite` returned.  A model is run with k-NN attention as `options` say; it is not
            changed.
        image_or_inputs: an image (`[C, H, W]` or `[B, C, H, W]`, a PIL image, or the path of one) or a tuple of the
            model's inputs.  Of a batch, the first example is drawn; curves and distances are of all.
        site: module path, or pattern, of the sites to draw (several in a list); default: all for the curves, six
            spread over the model for the kept keys.
        query: whose kept keys to draw: a token's number, (row, column) of a patch, "cls", "center"; several in a list.
        prefix: tokens before the patches (CLS, registers); default: read off the number of tokens.
        grid: (rows, columns) of the patches; default: read off the number of tokens and the shape of the image.
        kwargs: keyword inputs of the model.
        options: options of `kvt_compile.config.Options`, e.g. `topk=0.25` or `select="window(7) | prefix"`, for a model
            that is not rewritten yet.  Where a selection knows the tokens' places, they are drawn there.

    Raises ValueError (OptionError among them) for a site, query or layout that the model does not have, ImageError for
    an image that cannot be read, ImportError where matplotlib is missing.
    """
    draw.new_figure(1, 1)  # fails now rather than after the model has run
    inputs, pixels = _inputs(model, image_or_inputs)
    aspect = None if pixels is None else pixels.shape[-2] / pixels.shape[-1]
    batch = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 1)
    asked = {_text(x): x for x in (query if isinstance(query, list) else [query])}
    patterns = [site] if isinstance(site, str) else list(site or ())
    found: list[SiteMeasures] = []
    seen: list[str] = []

    def look(call: SiteCall) -> None:
        seen.append(call.where.module)
        if patterns and not any(fnmatch.fnmatchcase(call.where.module, pattern) for pattern in patterns):
            return
        _, _, rows, keys = call.shape
        windowed = call.shape[0] > batch
        shape = 1.0 if windowed and aspect is not None else aspect  # windows are square, whatever the image is
        placed = call.geometry if isinstance(call, AttentionCall) else None
        if placed is None:
            key_tokens = infer_tokens(keys, shape, *((None, None) if windowed else (prefix, grid)))
        else:  # frames of a video one below the other
            key_tokens = Tokens(placed.prefix, math.prod(placed.grid[:-1]), placed.grid[-1])
        same = rows == keys
        query_tokens = key_tokens if same else infer_tokens(rows, shape, prefix)
        wanted = {text: number for text, x in asked.items() if (number := _number(x, query_tokens)) is not None}
        found.append(measure(call, batch, wanted, query_tokens, key_tokens))

    if not isinstance(model, RewriteResult) and not _is_rewritten(model):
        # every site is looked at, also where k keeps every key; one run is not worth building kernels for
        places = {name: x for name, x in (("grid", grid), ("prefix", prefix)) if x is not None}
        more = places if options.get("select") is not None else {}
        options = {"force_rewrite": True, "lowering": "aten", **more, **options}
    observe(model, inputs, look, kwargs=kwargs, **options)
    _check(found, seen, patterns, asked)
    image = None if pixels is None else picture(pixels)
    drawn = found if patterns else _spread(found, MOST_SITES)
    kept = {}
    for text in asked:
        if rows := [measures for measures in drawn if text in measures.kept]:
            kept[text] = draw.kept_figure(rows, text, image, MOST_HEADS)
    return Figures(kept, draw.mass_figure(found), draw.distance_figure(found), tuple(found))


def _inputs(model: Any, given: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """(inputs of the model, the first image `[C, H, W]` or None)."""
    if isinstance(given, str | PathLike):
        given = open_image(given)
    if hasattr(given, "resize") and hasattr(given, "convert"):  # a PIL image
        given = prepare(given.convert("RGB"), model.module if isinstance(model, RewriteResult) else model)
    if isinstance(given, Tensor):
        given = (
            given.unsqueeze(0) if given.dim() == 3 and given.is_floating_point() and given.shape[0] <= 4 else given,
        )
    if not isinstance(given, tuple | list):
        raise TypeError(f"expected an image (tensor, PIL image, path) or a tuple of inputs, got {type(given).__name__}")
    inputs = tuple(given)
    first = inputs[0] if inputs else None
    is_image = isinstance(first, Tensor) and first.dim() == 4 and first.is_floating_point() and first.shape[1] <= 4
    return inputs, first[0] if is_image else None  # type: ignore[index]


def _is_rewritten(model: Any) -> bool:
    from kvt_compile.observe import has_sites

    return isinstance(model, torch.fx.GraphModule) and has_sites(model)


def _text(query: Query) -> str:
    return ", ".join(map(str, query)) if isinstance(query, tuple) else str(query)


def _number(query: Query, tokens: Tokens) -> int | None:
    """The token a query means; None where this site has no such token."""
    match query:
        case bool():
            raise TypeError("query is a bool, expected a token's number, (row, column), 'cls' or 'center'")
        case int():
            return query if 0 <= query < tokens.count else None
        case "cls":
            return 0 if tokens.prefix else None
        case "center":
            return tokens.prefix + (tokens.rows // 2) * tokens.columns + tokens.columns // 2
        case (int(row), int(column)):
            inside = 0 <= row < tokens.rows and 0 <= column < tokens.columns
            return tokens.prefix + row * tokens.columns + column if inside else None
    raise ValueError(f"query is {query!r}, expected a token's number, (row, column) of a patch, 'cls' or 'center'")


def _check(found: list[SiteMeasures], seen: list[str], patterns: list[str], asked: Iterable[str]) -> None:
    if not seen:
        raise ValueError("the model has no attention that is replaced so; kvt_compile.explain says why")
    if not found:
        known = ", ".join(dict.fromkeys(name or "(top level)" for name in seen))
        raise ValueError(f"site {', '.join(map(repr, patterns))} matches no attention site; the sites are: {known}")
    if not any(site.kept for site in found):
        first = found[0].queries
        raise ValueError(
            f"no site has the query {', '.join(asked)}: {found[0].name} has {draw.describe(first)}, "
            f"tokens 0 to {first.count - 1}"
        )


def _spread(sites: list[SiteMeasures], most: int) -> list[SiteMeasures]:
    if len(sites) <= most:
        return sites
    return [sites[round(n * (len(sites) - 1) / (most - 1))] for n in range(most)]
