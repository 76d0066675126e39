"""Attention sites and refusals, with what was decided about them -> `Report`: a table for people, a dict for programs.

    AttentionSite + (k, reason, lowering)  ->  SiteReport      one row
    Refusal                                ->  RefusalReport   one row
    str(report)                            ->  the table in 100 columns; report.to_dict() is ready for JSON

Rows hold text and numbers only, no graph nodes: a report can be kept, pickled and compared.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.passes.site import AttentionSite, Axis, Captured, Refusal, Size, Where
from kvt_compile.report.kernel_source import kernel_source
from kvt_compile.report.names import renamed, short_names, with_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvt_compile.report.graphs import GraphReport

Outcome = Literal["fused", "scores-kept", "dense"]
WIDTH = 100


@dataclass(frozen=True)
class SiteReport:
    """One attention of the model.

    q is [batch, heads, queries, head_dim], k [batch, kv_heads, keys, head_dim], v [batch, kv_heads, keys, value_dim];
    a size is a number, or the text of a symbolic one when shapes are dynamic.
    """

    module: str
    """Module path, e.g. `blocks.0.attn`; empty at the top level."""
    location: str
    """The line of the model's code, e.g. `timm/layers/attention.py:98`; empty where the graph carries none."""
    outcome: Outcome
    """fused: one kernel; scores-kept: fused selection and softmax, the rest as written; dense: left as it was."""
    reason: str
    """Why it was left dense, or why its scores had to be kept; empty where it is fused."""
    axis: Axis
    batch: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size
    value_dim: Size
    dtype: str
    topk: Size | None
    """Keys kept per query; None where the site is left dense."""
    score: str
    """What is compared and goes into the softmax, as an expression in the raw score s and captured tensors."""
    weight: str
    """What follows the softmax, as an expression in its result p."""
    captured: tuple[Captured, ...]
    lowering: str
    """How the site is computed: `aten`, `c`, ...; empty where it is left dense."""
    spec: KernelSpec | SoftmaxSpec | None = None
    """What the generated code depends on; None where it is left dense, or known only at run time."""
    graph: int = 0
    """Which captured graph it is in: a model that breaks into several graphs has several."""

    @classmethod
    def of(
        cls,
        site: AttentionSite,
        *,
        topk: Size | None,
        reason: str = "",
        lowering: str = "",
        spec: KernelSpec | SoftmaxSpec | None = None,
        graph: int = 0,
    ) -> SiteReport:
        """The row of a site for which `topk` was decided; `reason` says why where that is None (left dense)."""
        dense = topk is None
        names = short_names(site.captured)
        return cls(
            module=site.where.module,
            location=location_of(site.where),
            outcome="dense" if dense else site.tier,
            reason=reason or ("" if dense else site.tier_reason),
            axis=site.axis,
            batch=site.batch,
            heads=site.heads,
            kv_heads=site.kv_heads,
            queries=site.queries,
            keys=site.keys,
            head_dim=site.head_dim,
            value_dim=site.value_dim,
            dtype=site.dtype,
            topk=topk,
            score=renamed(site.score, names),
            weight=renamed(site.weight, names),
            captured=tuple(with_name(tensor, names) for tensor in site.captured),
            lowering="" if dense else lowering,
            spec=None if dense else spec,
            graph=graph,
        )


@dataclass(frozen=True)
class RefusalReport:
    """One softmax (or attention call) that is left as the model wrote it, and why."""

    node: str
    """Its name in the captured graph."""
    module: str
    location: str
    reason: str
    """In one sentence."""
    step: str
    """The step of the finder that failed: the nearest miss."""
    graph: int = 0
    at: str = ""
    """The node the step failed at; empty where it is `node` itself."""

    @classmethod
    def of(cls, refusal: Refusal, *, graph: int = 0) -> RefusalReport:
        return cls(
            node=refusal.node.name,
            module=refusal.where.module,
            location=location_of(refusal.where),
            reason=refusal.reason,
            step=refusal.step,
            at="" if refusal.at in (None, refusal.node) else str(refusal.at),
            graph=graph,
        )


@dataclass(frozen=True)
class Report:
    """What was found in a model, what became of it, and what was left alone.  Prints as a table; changes nothing."""

    sites: tuple[SiteReport, ...]
    refusals: tuple[RefusalReport, ...]
    graphs: tuple[GraphReport, ...] = field(default=(), repr=False)
    """The captured graphs before and after the rewrite, those nested in them included."""

    @property
    def counts(self) -> dict[str, int]:
        """How many sites there are, how many of each outcome, and how many refusals."""
        outcomes = Counter(site.outcome for site in self.sites)
        return {
            "sites": len(self.sites),
            "fused": outcomes["fused"],
            "scores-kept": outcomes["scores-kept"],
            "dense": outcomes["dense"],
            "refusals": len(self.refusals),
        }

    @property
    def summary(self) -> str:
        """One line, e.g. `12 sites: 12 fused, 0 scores-kept, 0 left dense; 1 softmax left alone`."""
        n = self.counts
        found = f"{n['sites']} {'site' if n['sites'] == 1 else 'sites'}: {n['fused']} fused, "
        found += f"{n['scores-kept']} scores-kept, {n['dense']} left dense"
        return f"{found}; {n['refusals']} {'softmax' if n['refusals'] == 1 else 'softmaxes'} left alone"

    def kernel_source(self, site: SiteReport | str, target: str | None = None) -> str:
        """The code generated for a site (its row, or its module path; a pattern such as `blocks.*` will do where the
        sites it matches share their code), under a header that names the site.  For this machine, or for a `target`:
        "cpu", "sm_80", "sm_90", "sm_100", "gfx942".  Raises LookupError, with what there is instead."""
        return kernel_source(self.sites, site, target)

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
        from kvt_compile.report.page.diff import diff_text

        return diff_text(self)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "") -> Path:
        """Writes everything there is to see as one HTML page that needs no network, and returns its path.

        `title` names the model.  Raises OSError, with what to do, where the file cannot be written; nothing half
        written is left behind.
        """
        from kvt_compile.report.page import page, write_whole

        return write_whole(path, page(self, title))

    def to_svg(self, path: str | os.PathLike[str]) -> Path:
        """Writes the graph as a picture, attention highlighted, and returns its path.  Raises as `to_html`."""
        from kvt_compile.report.page import graph_svg, write_whole

        return write_whole(path, graph_svg(self))

    def __rich__(self) -> RenderableType:
        from kvt_compile.report.table import render  # rich is for people: compiling a model does not import it

        return render(self)

    def __str__(self) -> str:
        from kvt_compile.report.table import as_text

        return as_text(self, width=WIDTH)


def location_of(where: Where) -> str:
    """`timm/layers/attention.py:98`; empty where the graph carries no line."""
    return f"{_short(where.file)}:{where.line}" if where.file else ""


@lru_cache(maxsize=1024)
def _short(file: str) -> str:
    """A file as it would be imported: `timm/layers/attention.py`, whatever folder the packages are in."""
    path = Path(file)
    folders = [Path(folder or ".").resolve() for folder in [*sys.path, "."]]
    inside = [path.relative_to(folder) for folder in folders if path.is_relative_to(folder)]
    return str(min(inside, key=lambda p: len(p.parts), default=path))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
