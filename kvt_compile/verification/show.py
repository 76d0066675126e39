"""What a verification found -> a table for the terminal, and its sentence."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvt_compile.kernels.disk.text import shown
from kvt_compile.report.names import folded
from kvt_compile.verification.facts import Difference, Findings

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 110
PATH_WIDTH = 36
"""Columns of the first column, in which module paths fold at a dot."""
BLUNT = 10.0
"""How many times its budget the outputs have to move when one key is kept, for the comparison to mean something."""


def summary(found: Findings) -> str:
    """The verdict, in a sentence or two."""
    what = "outputs and gradients" if found.gradients else "outputs"
    if found.dropped:
        return f"FAILED: {found.dropped[0]}."
    if found.together is None:
        return "No attention of the model is rewritten, so there is nothing to compare."
    if (wrong := found.first) is not None:
        more = sum(not site.ok for site in found.sites) - 1
        return (
            f"FAILED: {wrong.module or '(top level)'} at {wrong.location}"
            f"{f' and {more} more' if more else ''}: {wrong.worst}."
        )
    if not found.together.ok:
        return f"FAILED: each attention is right alone, and together they are not: {found.together}."
    count = {0: "The attentions", 1: "The attention"}.get(len(found.sites), f"{len(found.sites)} attentions")
    said = f"OK: {count} at k = N {'is' if len(found.sites) == 1 else 'are'} the dense model, {what}."
    if is_blunt(found):
        said += f" But one key in place of all moves the outputs by {found.bite:.1e} only: little would be noticed."
    return said


def is_blunt(found: Findings) -> bool:
    """Whether a wrong attention might go unnoticed with these weights and inputs."""
    if found.bite is None or found.together is None or not math.isfinite(found.bite):
        return False
    return found.bite < BLUNT * found.together.budget


def render(found: Findings) -> RenderableType:
    """What `rich` prints.  Everything from the model is `Text`."""
    parts: list[RenderableType] = []
    if found.together is not None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("attention alone at k = N", overflow="fold", max_width=PATH_WIDTH)
        table.add_column("outcome")
        for name in ("N", "error", "budget"):
            table.add_column(name, justify="right")
        table.add_column("nearest to its budget", overflow="fold")
        for site in found.sites:
            table.add_row(
                Text(folded(shown(site.module, keep=""), PATH_WIDTH) or "(top level)"),
                site.outcome, str(site.keys), *_numbers(site.worst),
            )  # fmt: skip
        table.add_section()
        table.add_row("all together", "", "", *_numbers(found.together))
        parts += [table, ""]
    parts += [Text(f"dropped: {shown(sentence, keep='')}", style="red") for sentence in found.dropped]
    for reason, paths in _grouped(found.left).items():
        names = ", ".join(path or "(top level)" for path in paths[:4]) + (" ..." if len(paths) > 4 else "")
        parts.append(Text(f"as the model has it: {shown(names, keep='')}: {shown(reason, keep='')}", style="dim"))
    if found.note:
        parts.append(Text(shown(found.note, keep=""), style="dim"))
    parts.append(Text(shown(summary(found), keep=""), style=f"bold {'green' if found.ok else 'red'}"))
    if found.reproduction:
        parts.append(Text(f"To see it again: python {shown(found.reproduction, keep='')}"))
    return Group(*parts)


def as_text(found: Findings, width: int = WIDTH) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(found), soft_wrap=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _numbers(check: Difference) -> tuple[Text, ...]:
    style = "" if check.ok else "red"
    name = f"{check.name}{' (in float64)' if check.bits == 64 else ''}"
    return (
        Text(f"{check.error:.1e}", style=style),
        Text(f"{check.budget:.1e}"),
        Text(shown(name, keep=""), style=style or "dim"),
    )


def _grouped(left: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path, reason in left:
        groups.setdefault(reason, []).append(path)
    return groups
