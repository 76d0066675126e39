"""A calibrated policy of selections -> a table for the terminal, or a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvt_compile.calibration.facts import SelectionCalibration
from kvt_compile.calibration.show import PATH_WIDTH
from kvt_compile.kernels.disk.text import shown
from kvt_compile.report.names import folded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


def render(policy: SelectionCalibration) -> RenderableType:
    """One row for each attention: its selection, what that does, and what it gains."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("attention", overflow="fold", max_width=PATH_WIDTH)
    table.add_column("keeps", overflow="fold")
    for name in ("keys", "checked mass", "in the output", "ms", "of dense"):
        table.add_column(name, justify="right")
    for site in policy.sites:
        n, grid = site.chosen, shown(site.grid, keep="")
        table.add_row(
            Text(folded(shown(site.path, keep=""), PATH_WIDTH) or "(top level)"),
            Text(f"{site.select or 'every key'}{f' on {grid}' if site.select and grid else ''}"),
            f"{site.kept[n]:.1%} of {site.keys}",
            f"{site.checked_mass:.4f} ≥ {site.checked_mass_bound:.4f}",
            f"{site.model_error[n]:.2e}" if policy.budget != "mass" else "",
            f"{1000 * site.seconds[n]:.3g}",
            f"{site.seconds[n] / max(site.seconds[-1], 1e-12):.2f}",
        )
    notes = [
        Text(f"{shown(path, keep='') or '(top level)'} stays dense: {shown(why, keep='')}", style="dim")
        for path, why in policy.left
    ]
    return Group(table, "", *notes, Text(policy.summary, style="bold"))


def plot(policy: SelectionCalibration) -> Figure:
    """Error against time of every selection that was tried, one colour for each attention, the chosen one filled."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    tried, output = figure.subplots(1, 2)
    colors = colormaps["viridis"].resampled(max(len(policy.sites), 2))
    for n, site in enumerate(policy.sites):
        shares = [seconds / max(site.seconds[-1], 1e-12) for seconds in site.seconds]
        tried.plot(shares, site.error, "o", color=colors(n), markersize=4, fillstyle="none")
        tried.plot(shares[site.chosen], site.error[site.chosen], "o", color=colors(n), label=site.path or "(top level)")
    tried.set(title="selections tried, filled: chosen", xlabel="time / dense", ylabel="relative error here")
    if len(policy.sites) <= 12:
        tried.legend(fontsize=6, frameon=False)
    output.plot([x[0] for x in policy.trail], [1 - x[1] for x in policy.trail], ".-", color="0.6")
    if policy.budget == "cosine":
        output.axhline(1 - policy.value, color="0.5", linestyle="--", linewidth=1)
    output.set(title="policies tried, on the checked examples", xlabel="average cost", ylabel="1 - cosine")
    output.set_yscale("log")
    return figure
