"""`SiteMeasures` -> matplotlib figures.

kept(query)    a row for each site, a column for each head: the image, dark where a patch is dropped
mass           one curve a site: share of the softmax inside the k largest keys, over k
distance       one point a head: how far away the kept keys are, layer by layer
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvt_compile.look.measure import SiteMeasures
from kvt_compile.look.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUERY = "#e6261f"
"""Outline of the query's patch."""
DIM = 0.22
"""How bright a dropped patch is."""


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: no window, no global state.  Raises ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; install it with: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def kept_figure(sites: Sequence[SiteMeasures], asked: str, image: Any, most_heads: int) -> Figure:
    """Which keys one query keeps.  `image` is `[height, width, 3]` in [0, 1], or None."""
    heads = min(most_heads, max(site.mass.shape[0] for site in sites))
    line = all(site.keys.rows == 1 for site in sites)
    cell = (1.5, 0.55) if line else (1.45, 1.45)
    figure = new_figure(1.3 + cell[0] * heads, 0.8 + (cell[1] + 0.12) * len(sites))
    axes = figure.subplots(len(sites), heads, squeeze=False)
    for row, site in zip(axes, sites, strict=True):
        label = f"{_short(site.name)}\n{textwrap.fill(_rule(site), 24)}"
        label += f"\n1st of {site.windows} windows" if site.windows > 1 else ""
        if line:
            row[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        else:
            row[0].set_ylabel(label, fontsize=8)
        for head, ax in enumerate(row):
            ax.set_xticks([])
            ax.set_yticks([])
            if head >= site.mass.shape[0] or asked not in site.kept:
                ax.set_axis_off()
                continue
            found = site.kept[asked]
            _cell(ax, site, found.weights[head], found.query, image)
    for head in range(heads):  # over the first row that has it: layers may differ in their heads
        has = next(row for row, site in zip(axes, sites, strict=True) if head < site.mass.shape[0])
        has[head].set_title(f"head {head}", fontsize=9)
    names = {site.queries.name(site.kept[asked].query) for site in sites if asked in site.kept}
    figure.suptitle(f"Keys kept by the query {names.pop() if len(names) == 1 else asked}", fontsize=10)
    figure.supxlabel(textwrap.fill(_legend(sites, image), int(figure.get_figwidth() * 15)), fontsize=8, color="#57606a")
    return figure


def _rule(site: SiteMeasures) -> str:
    """`k = 64 of 197`, or `window(13) | prefix: 41 of 197`."""
    count = site.keys.count
    if not site.select:
        return f"{'own ' if site.own else ''}k = {site.topk} of {count}"
    ranked = f", k = {site.topk}" if site.topk < count else ""
    return f"{site.select}{ranked}: {site.share * count:.3g} of {count}"


def _legend(sites: Sequence[SiteMeasures], image: Any) -> str:
    on_image = [image is not None and site.keys.rows > 1 and site.windows == 1 for site in sites]
    notes = ["bright: kept, dark: dropped"] if any(on_image) else []
    notes += [] if all(on_image) else ["blue: kept, darker with more weight"]
    notes += ["red: the query"]
    if any(site.keys.prefix for site in sites):
        notes.append("boxes above: CLS and registers, green where kept")
    return "; ".join(notes)


def _cell(ax: Axes, site: SiteMeasures, weights: torch.Tensor, query: int, image: Any) -> None:
    from matplotlib.patches import Rectangle

    keys = site.keys
    patches = weights[keys.prefix :].view(keys.rows, keys.columns)
    if keys.rows > 1 and image is not None and site.windows == 1:
        height, width = image.shape[:2]
        kept = (patches > 0).float()[None, None]
        mask = torch.nn.functional.interpolate(kept, (height, width), mode="nearest")[0, 0].numpy()
        ax.imshow(image * (DIM + (1 - DIM) * mask[..., None]), aspect="auto" if keys.rows == 1 else "equal")
        step_y, step_x = height / keys.rows, width / keys.columns
    else:
        shown = patches / patches.max().clamp_min(1e-12)
        # a kept key is never white, however little it weighs
        shown = torch.where(patches > 0, 0.15 + 0.85 * shown, 0.0)
        ax.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto" if keys.rows == 1 else "equal")
        step_y = step_x = 1.0
    place = site.queries.place(query)
    if place is not None and site.queries.rows * site.queries.columns and _same_image(site):
        y, x = (n * s - 0.5 for n, s in zip(place, _steps(site, step_y, step_x), strict=True))
        height, width = _steps(site, step_y, step_x)
        ax.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=QUERY, linewidth=1.4, clip_on=False))
    if keys.prefix:  # CLS and registers: small boxes above the image, filled where kept
        for token in range(keys.prefix):
            kept_token = bool(weights[token] > 0)
            ax.add_patch(
                Rectangle(
                    (0.02 + 0.075 * token, 1.025),
                    0.055,
                    0.055,
                    transform=ax.transAxes,
                    clip_on=False,
                    linewidth=0.8,
                    edgecolor=QUERY if token == query else "#57606a",
                    facecolor="#1a7f37" if kept_token else "none",
                )
            )


def _same_image(site: SiteMeasures) -> bool:
    return (site.queries.rows == 1) == (site.keys.rows == 1)


def _steps(site: SiteMeasures, step_y: float, step_x: float) -> tuple[float, float]:
    """Size of a patch of the queries, where the keys' patches have these sizes (MViT pools its keys)."""
    return step_y * site.keys.rows / site.queries.rows, step_x * site.keys.columns / site.queries.columns


def mass_figure(sites: Sequence[SiteMeasures]) -> Figure:
    """Attention mass inside the top k as k grows: the mean over heads, with what is kept marked: the chosen k, or the
    keys of a selection, which are seldom the best."""
    figure = new_figure(7.2, 4.6)
    ax = figure.subplots()
    colors = _colors(len(sites))
    for site, color in zip(sites, colors, strict=True):
        keys = site.mass.shape[1]
        share = torch.arange(0, keys + 1) / keys
        mean = torch.cat([torch.zeros(1), site.mass.mean(0)])
        ax.plot(share, mean, color=color, linewidth=1.4, label=_short(site.name))
        dot = (site.share, site.held) if site.select else (site.topk / keys, float(mean[site.topk]))
        ax.plot(*dot, "o", color=color, markersize=4)
    ax.set(xlabel="share of the keys, largest scores first", ylabel="attention mass", xlim=(0, 1), ylim=(0, 1.02))
    ax.set_title("Attention mass inside the top k (dots: what each site keeps)", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7, ncols=1 + len(sites) // 14, loc="lower right", frameon=False)
    return figure


def distance_figure(sites: Sequence[SiteMeasures]) -> Figure | None:
    """Distance of the kept keys from their query, one point a head; None where no site's tokens have a place."""
    placed = [site for site in sites if not site.distance.isnan().all()]
    if not placed:
        return None
    figure = new_figure(max(5.0, 1.6 + 0.5 * len(placed)), 4.4)
    ax = figure.subplots()
    for position, (site, color) in enumerate(zip(placed, _colors(len(placed)), strict=True)):
        ax.plot([position] * len(site.distance), site.distance, "o", color=color, markersize=5, alpha=0.8)
        ax.plot([position - 0.35, position + 0.35], [site.distance_of_all] * 2, color="#57606a", linewidth=1, ls="--")
    ax.set_xticks(range(len(placed)), [_short(site.name) for site in placed], rotation=60, ha="right", fontsize=7)
    ax.set_ylim(bottom=0)
    unit = "tokens" if all(site.queries.rows == 1 for site in placed) else "patches"
    ax.set_ylabel(f"mean distance of the kept keys ({unit})")
    ax.set_title("How far the kept keys are (dots: heads; dashed: all keys)", fontsize=10)
    ax.grid(axis="y", alpha=0.25)
    return figure


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](torch.linspace(0.0, 0.88, max(count, 1)).numpy())[:count]


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def describe(tokens: Tokens) -> str:
    """`1 prefix token, 14 x 14 patches`."""
    prefix = f"{tokens.prefix} prefix {'token' if tokens.prefix == 1 else 'tokens'}, " if tokens.prefix else ""
    return prefix + (f"a line of {tokens.columns}" if tokens.rows == 1 else f"{tokens.rows} x {tokens.columns} patches")
