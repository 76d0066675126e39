"""A report's row, or the module path of some -> what the finder read there, under a header that names each.

# blocks.0.attn  timm/layers/attention.py:98  fused: 0.125*s
v0: f32[2, 197, 576] = linear(...)
...
"""

from __future__ import annotations

from collections.abc import Sequence

from kvt_compile.report.facts import RefusalReport, SiteReport
from kvt_compile.report.rows import matching, path_of

Row = SiteReport | RefusalReport


def canonical(rows: Sequence[Row], wanted: Row | str) -> str:
    """The text of every wanted row that has one.  Raises LookupError when no row is meant, or none has a text."""
    found = matching(rows, wanted) if isinstance(wanted, str) else [wanted]
    shown = [row for row in found if row.canonical]
    if not shown:
        raise LookupError(f"{path_of(found[0])} runs outside every captured graph, so no values were read")
    return "\n\n".join(f"{_header(row)}\n{row.canonical}" for row in shown)


def _header(row: Row) -> str:
    if isinstance(row, RefusalReport):
        outcome = f"left alone: {row.reason} ({row.step})"
    else:
        outcome = f"{row.outcome}: {row.reason or row.score}"
    return "  ".join(filter(None, (f"# {path_of(row)}", row.location, outcome)))
