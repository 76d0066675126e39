"""The face of all that is reported: what was found, as facts, with every view of it.

    str(report)          the table in 100 columns        report.to_html(path)         one page with everything
    report.to_dict()     ready for JSON                  report.kernel_source(site)   the code generated for a site
    report.diff          the graph before and after      report.canonical(site)       what the finder read there

The only file that knows all views; none of them knows it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvt_compile.kernels.disk.whole import write_whole
from kvt_compile.report.canonical import canonical
from kvt_compile.report.diff import diff_text
from kvt_compile.report.facts import Findings, RefusalReport, SiteReport
from kvt_compile.report.kernel_source import kernel_source

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100


@dataclass(frozen=True)
class Report(Findings):
    """What was found in a model, what became of it, and what was left alone.  Prints as a table; changes nothing."""

    def kernel_source(self, site: SiteReport | str, target: str | None = None) -> str:
        """The code generated for a site (its row, or its module path; a pattern such as `blocks.*` will do where the
        sites it matches share their code), under a header that names the site.  For this machine, or for a `target`:
        "cpu", "sm_80", "sm_90", "sm_100", "gfx942".  Raises LookupError, with what there is instead."""
        return kernel_source(self.sites, site, target)

    def canonical(self, site: SiteReport | RefusalReport | str) -> str:
        """What the finder read at a site or a softmax that is left alone (its row, or its module path or a pattern of
        them): the values around it in canonical form, one a line.  Raises LookupError, with what there is instead."""
        return canonical((*self.sites, *self.refusals), site)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, numbers and None, ready for `json.dumps`; one entry per site, none folded."""
        return {
            "summary": self.counts,
            "sites": [_plain(asdict(site)) for site in self.sites],
            "refusals": [_plain(asdict(refusal)) for refusal in self.refusals],
        }

    @property
    def graph_before(self) -> str:
        """The captured graphs as text, one node a line."""
        return "\n".join(node.line for graph in self.graphs for node in graph.before)

    @property
    def graph_after(self) -> str:
        """The rewritten graphs as text, one node a line."""
        return "\n".join(node.line for graph in self.graphs for node in graph.after)

    @property
    def diff(self) -> str:
        """The graph around every rewritten site, before (`-`) and after (`+`)."""
        return diff_text(self)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "") -> Path:
        """Writes everything there is to see as one HTML page that needs no network, and returns its path.

        `title` names the model.  Raises OSError, with what to do, where the file cannot be written; nothing half
        written is left behind.
        """
        from kvt_compile.report.page import page  # templates are for people: compiling a model does not import them

        return write_whole(path, page(self, title))

    def to_svg(self, path: str | os.PathLike[str]) -> Path:
        """Writes the graph as a picture, attention highlighted, and returns its path.  Raises as `to_html`."""
        from kvt_compile.report.page import graph_svg

        return write_whole(path, graph_svg(self))

    def __rich__(self) -> RenderableType:
        from kvt_compile.report.table import render  # and so is rich

        return render(self)

    def __str__(self) -> str:
        from kvt_compile.report.table import as_text

        return as_text(self, width=WIDTH)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
