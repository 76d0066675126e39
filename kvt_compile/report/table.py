"""`Report` -> a table in the terminal.  Sites that differ in their module path alone share a row.

blocks.{0..11}.attn ×12     fused    1×3 heads, 197×197      98    0.125*s
attention.py:98             aten     D 64, float32                 ...
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvt_compile.kernels.disk.text import shown
from kvt_compile.report.facts import Findings, RefusalReport, SiteReport
from kvt_compile.report.kernel_spec import selection_text
from kvt_compile.report.names import folded

if TYPE_CHECKING:
    from rich.console import RenderableType

SITE_WIDTH, REFUSAL_WIDTH = 31, 36
"""Columns of the first column, in which module paths fold at a dot."""
COLORS = {"fused": "green", "scores-kept": "cyan", "dense": "yellow"}


def as_text(report: Findings, width: int) -> str:
    """The table as plain text, no line longer than `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(report: Findings) -> RenderableType:
    """What `rich` prints for a report.  Everything from the model is `Text`: `mask[b, i]` is not markup."""
    parts: list[RenderableType] = []
    if report.sites:
        parts.append(_sites(report))
    if report.refusals:
        parts.append(_refusals(report))
    spaced = [item for part in parts for item in (part, "")]
    return Group(*spaced, Text(report.summary, style="bold"))


def _sites(report: Findings) -> Table:
    table = _table("attention", "outcome", "B×H Nq×Nk", "k", "score")
    table.columns[0].max_width, table.columns[4].ratio = SITE_WIDTH, 1
    table.columns[3].justify = "right"
    for modules, site in fold(report.sites):
        table.add_row(
            _lines(*_path(modules, SITE_WIDTH), (_file(site.location), "dim")),
            _lines((site.outcome, COLORS[site.outcome]), (site.lowering, "dim")),
            _lines(*_shape(site)),
            "" if site.topk is None else site.share if site.unranked else str(site.topk),
            _lines(*_algebra(site)),
        )
    return table


def _refusals(report: Findings) -> Table:
    table = _table("left alone", "why")
    table.columns[0].max_width, table.columns[1].ratio = REFUSAL_WIDTH, 1
    alike: dict[tuple[str, str, str], list[RefusalReport]] = {}
    for row in report.refusals:
        alike.setdefault((row.location, row.reason, row.step), []).append(row)
    for (location, reason, step), rows in alike.items():
        names = rows[0].node if len(rows) == 1 else f"{rows[0].node} and {len(rows) - 1} more"
        place = f"{names}  {_file(location)}" if location else names
        paths = _path([row.module for row in rows], REFUSAL_WIDTH)
        table.add_row(_lines(*paths, (place, "dim")), _lines(reason, (f"({step})", "dim")))
    return table


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, show_edge=False, header_style="bold", leading=1)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


_OVER = {"channel": "over channels", "batch": "over the batch", "unknown": "over an unknown axis"}


def _shape(site: SiteReport) -> list[str | tuple[str, str]]:
    heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads} over {site.kv_heads}"
    dims = f"{site.head_dim}" if site.head_dim == site.value_dim else f"{site.head_dim}/{site.value_dim}"
    lines: list[str | tuple[str, str]] = [f"{site.batch}×{heads} {site.queries}×{site.keys}"]
    lines.append((f"D {dims} {site.dtype.removeprefix('torch.')}", "dim"))
    if site.axis != "token":
        lines.append(_OVER[site.axis])
    if 0 in site.keys_axes:  # often the batch, which only a user knows (`batch_dim`)
        lines.append((f"over {site.keys_from}", "dim"))
    return lines


def _algebra(site: SiteReport) -> list[str | tuple[str, str]]:
    lines: list[str | tuple[str, str]] = [_rounded(site.score)]
    if site.weight != "p":
        lines.append(f"then {_rounded(site.weight)}")
    for tensor in site.captured:
        size = "×".join(str(n) for n in tensor.shape) or "scalar"
        lines.append((f"{tensor.name}: {size}{', trained' if tensor.requires_grad else ''}", "dim"))
    if site.select:
        lines.append((f"keeps {selection_text(site)}", "dim"))
    if site.own_k:
        lines.append((f"own k = {site.own_k}{'' if site.keeps_own or site.topk is None else ', replaced'}", "dim"))
    if site.runs > 1:
        lines.append((f"one compiled graph, which runs {site.runs} times", "dim"))
    if site.reason:
        lines.append((f"{site.outcome}: {site.reason}", COLORS[site.outcome]))
    return lines


def fold(rows: Iterable[SiteReport]) -> list[tuple[list[str], SiteReport]]:
    """Rows that differ in their module path alone, together: [([paths], row)], in order of first appearance."""
    alike: dict[SiteReport, list[str]] = {}
    for row in rows:
        alike.setdefault(replace(row, module=""), []).append(row.module)
    return [(modules, row) for row, modules in alike.items()]


def _path(modules: list[str], width: int) -> list[str]:
    """The lines that name the modules; what a path must not do to a terminal is gone before it is folded."""
    return folded(shown(label(modules), keep=""), width).split("\n")


def _lines(*lines: str | tuple[str, str]) -> Text:
    """Lines of plain text, a pair carrying its style; empty ones are left out."""
    styled = [line if isinstance(line, tuple) else (line, "") for line in lines]
    return Text("\n").join(Text(shown(text, keep=""), style=style) for text, style in styled if text)


def _rounded(expression: str) -> str:
    """Numbers to four places, for reading: 0.17677669529663687*s -> 0.1768*s."""
    return re.sub(r"\d+\.\d{5,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.4g}", expression)


def _file(location: str) -> str:
    """The file's own name and the line: the folder does not fit, and `to_dict` has it."""
    return location.rsplit("/", 1)[-1]


def label(modules: list[str]) -> str:
    """`blocks.{0..11}.attn ×12` for paths that differ in one number, else the first, the last and how many."""
    count = f" ×{len(modules)}" if len(modules) > 1 else ""
    names = list(dict.fromkeys(module or "(top level)" for module in modules))
    if len(names) == 1:
        return names[0] + count
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(part) for part in parts}) == 1:
        differing = [n for n in range(len(parts[0])) if len({part[n] for part in parts}) > 1]
        if len(differing) == 1 and parts[0][differing[0]].isdigit():
            inner = "{" + _ranges([int(part[differing[0]]) for part in parts]) + "}"
            return "".join(inner if n == differing[0] else part for n, part in enumerate(parts[0])) + count
    return f"{names[0]} … {names[-1]}{count}"


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> `0..2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
