"""A calibrated policy -> a table for the terminal, or a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvt_compile.calibration.facts import Calibration
from kvt_compile.kernels.disk.text import shown
from kvt_compile.report.names import folded
from kvt_compile.topk import TopK, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


PATH_WIDTH = 40
"""Columns of the first column, in which module paths fold at a dot."""


def render(policy: Calibration) -> RenderableType:
    """One row for each attention: its k, and what that k does."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("attention", overflow="fold", max_width=PATH_WIDTH)
    for name in ("keys", "k", "mass", "checked mass", "error here", "in the output"):
        table.add_column(name, justify="right")
    for site in policy.sites:
        n = policy.grid.index(site.topk)
        table.add_row(
            Text(folded(shown(site.path, keep=""), PATH_WIDTH) or "(top level)"),
            str(site.keys),
            f"{resolve(site.topk, site.keys)}",
            f"{site.mass[n]:.4f}",
            f"{site.checked_mass:.4f} ≥ {site.checked_mass_bound:.4f}",
            f"{site.error[n]:.2e}",
            f"{site.model_error[n]:.2e}" if policy.budget != "mass" else "",
        )
    return Group(table, "", Text(policy.summary, style="bold"))


def plot(policy: Calibration) -> Figure:
    """Mass and error against the share of keys, one line for each attention, its k as a dot; and the policies tried."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    mass, error, output = figure.subplots(1, 3)
    colors = colormaps["viridis"].resampled(max(len(policy.sites), 2))
    for n, site in enumerate(policy.sites):
        shares = [_share(k, site.keys) for k in policy.grid]
        at = policy.grid.index(site.topk)
        for axes, values in ((mass, site.mass), (error, [e if e > 0 else float("nan") for e in site.error])):
            axes.plot(shares, values, color=colors(n), linewidth=1, label=site.path or "(top level)")
            axes.plot(shares[at], values[at], "o", color=colors(n), markersize=5)
    mass.set(title="attention mass inside the k largest", xlabel="share of keys kept", ylabel="mass")
    if policy.budget == "mass":
        mass.axhline(policy.value, color="0.5", linestyle="--", linewidth=1)
    error.set(title="relative error of the attention's output", xlabel="share of keys kept", yscale="log")
    for axes in (mass, error, output):
        axes.title.set_size(10)
    if len(policy.sites) <= 12:
        mass.legend(fontsize=6, frameon=False)
    ratios, cosines = [point[0] for point in policy.trail], [1 - point[1] for point in policy.trail]
    output.plot(ratios, cosines, ".-", color="0.6", label="policies tried")
    output.plot(policy.ratio, 1 - policy.check.cosine, "o", color="tab:red", label="chosen")
    if policy.budget == "cosine":
        output.axhline(1 - policy.value, color="0.5", linestyle="--", linewidth=1, label="budget")
    output.set(title="model output, on the checked examples", xlabel="average share of keys kept", ylabel="1 - cosine")
    output.set_yscale("log")
    output.legend(fontsize=8, frameon=False)
    return figure


def _share(k: TopK, keys: int) -> float:
    return resolve(k, keys) / keys
