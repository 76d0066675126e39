"""`Report` -> what the templates show -> HTML.

    sites      one row, and below it score, cost, diff of the graph, generated code
    graphs     nested boxes of nodes; `script.js.jinja` draws the edges
    refusals   reason, and the steps of the finder up to the one that failed

All the thinking is done here and in the modules beside this one; the templates only lay out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from kvt_compile.kernels.op import lowerings
from kvt_compile.report.diff import Line, site_diff
from kvt_compile.report.facts import Findings, GraphReport, RefusalReport, SiteReport
from kvt_compile.report.kernel_spec import selection_text
from kvt_compile.report.page.cost import bytes_text, cost, flops_text
from kvt_compile.report.page.highlight import highlighted, style_sheet
from kvt_compile.report.page.mathml import mathml
from kvt_compile.report.page.outline import Box, Leaf, outline

STEPS = {
    "capture": "in a graph that torch.compile captured",
    "values": "from the softmax forwards to a product with the values",
    "scores": "back from the softmax to a product of queries and keys",
    "axes": "which axes are batch, heads, queries, keys and features",
    "provenance": "attention over tokens, not over channels or the batch",
    "weights": "what happens to the weights after the softmax",
    "closed": "nobody else reads what lies between the two products",
    "selection": "what the model itself selects is k-NN attention",
}
"""The capture, and the steps of the finder in the order they are tried, in words."""


@dataclass(frozen=True)
class Kernel:
    """Generated code, shared by every site with its spec."""

    name: str
    language: str
    html: Markup
    lines: int
    sites: int


def page(report: Findings, title: str = "") -> str:
    """The page as text.  `title` names the model."""
    kernels, kernel_of = _kernels(report)
    diffs = _diffs(report)
    light, dark = style_sheet()
    graphs = [_GraphView(graph, report) for graph in report.graphs]
    return _template().render(
        title=title or "k-NN attention",
        report=report,
        counts=report.counts,
        saved=_saved(report),
        sites=[_site(number, report, kernel_of[number], diffs) for number in range(len(report.sites))],
        several_graphs=len({site.graph for site in report.sites} | {r.graph for r in report.refusals}) > 1,
        refusals=[_refusal(refusal) for refusal in report.refusals],
        kernels=kernels,
        graphs=graphs,
        edges=Markup(json.dumps([graph.edges for graph in graphs], separators=(",", ":"))),
        source_light=Markup(light),
        source_dark=Markup(dark),
        version=version("kvt-compile"),
        torch_version=torch.__version__,
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvt_compile.report.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


# --- sites ------------------------------------------------------------------------------------------------------------


def _site(number: int, report: Findings, kernel: str, diffs: dict[int, tuple[Line, ...]]) -> dict[str, Any]:
    site = report.sites[number]
    price = cost(site)
    weight = "" if site.weight == "p" else mathml(site.weight, left="w_ij", block=True)
    return {
        "number": number,
        "row": site,
        "path": site.module or "(top level)",
        "score": Markup(mathml(site.score, head_dim=site.head_dim)),
        "score_block": Markup(mathml(site.score, left="t_ij", head_dim=site.head_dim, block=True)),
        "weight_block": Markup(weight),
        "memory": None if price is None else (bytes_text(price.dense_bytes), bytes_text(price.knn_bytes)),
        "flops": None if price is None else (flops_text(price.dense_flops), flops_text(price.knn_flops)),
        "per_example": price is not None and price.per_example,
        "kept": _share(site),
        "own": f"own k = {site.own_k}" if site.own_k else "",
        "kernel": kernel,
        "diff": diffs.get(number, ()),
    }


def _saved(report: Findings) -> tuple[str, str, str] | None:
    """(dense, k-NN, how counted) of all rewritten sites together; None where there is none, or a size is unknown."""
    prices = [cost(site) for site in report.sites if site.topk is not None]
    known = [price for price in prices if price is not None]
    if not known or len(known) < len(prices):
        return None
    dense, knn = sum(price.dense_bytes for price in known), sum(price.knn_bytes or 0 for price in known)
    how = "as k-NN attention" + (", for one example" if any(price.per_example for price in known) else "")
    return bytes_text(dense), bytes_text(knn), how


def _share(site: SiteReport) -> str:
    """`50 %` of the keys are kept."""
    if site.select:
        return selection_text(site)
    if isinstance(site.topk, int) and isinstance(site.keys, int) and site.keys:
        return f"{100 * site.topk / site.keys:.0f} %"
    return ""


def _kernels(report: Findings) -> tuple[list[Kernel], list[str]]:
    """Every distinct kernel, and each site's kernel by name (empty where none is generated)."""
    codes: dict[Any, tuple[str, str, str]] = {}
    of: list[str] = []
    count: dict[str, int] = {}
    for site in report.sites:
        key = (site.lowering, site.spec)
        if key not in codes:
            codes[key] = _code(site)
        name = codes[key][0]
        of.append(name)
        count[name] = count.get(name, 0) + 1
    kernels = {
        name: Kernel(name, language, Markup(highlighted(text, language)), text.count("\n"), count[name])
        for name, language, text in codes.values()
        if name
    }
    return list(kernels.values()), of


def _code(site: SiteReport) -> tuple[str, str, str]:
    """(name, language, text); all empty where nothing is generated."""
    if site.outcome == "dense" or site.spec is None:
        return "", "", ""
    source = lowerings.get(site.lowering).source(site.spec)
    if source is None:
        return "", "", ""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:8]
    return f"{site.lowering}-{digest}", source.language, source.text


def _diffs(report: Findings) -> dict[int, tuple[Line, ...]]:
    return {nodes.site: site_diff(graph, nodes) for graph in report.graphs for nodes in graph.sites}


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refusal(refusal: RefusalReport) -> dict[str, Any]:
    steps = list(STEPS)
    failed = steps.index(refusal.step) if refusal.step in steps else len(steps)
    states = ["done"] * failed + ["failed"] + ["open"] * len(steps)
    return {
        "row": refusal,
        "path": refusal.module or "(top level)",
        "steps": list(zip(STEPS.values(), states, strict=False)),
        "at": refusal.at or refusal.node,
    }


# --- graphs -----------------------------------------------------------------------------------------------------------


class _GraphView:
    """One graph as the template walks it."""

    def __init__(self, graph: GraphReport, report: Findings) -> None:
        view = outline(graph)
        self.title = graph.title
        self.root = view.root
        self.weights = view.weights
        self.edges = [list(edge) for edge in view.edges]
        self.count = sum(1 for _ in view.root.leaves)
        self._report = report

    def rows(self) -> Iterator[tuple[str, Any]]:
        """("open", box), ("close", box) and ("leaf", leaf) in the order they are written: no recursion in templates."""
        return _walk(self.root)

    def outcome(self, leaf: Leaf) -> str:
        if leaf.refusal is not None:
            return "refused"
        return "" if leaf.site is None else self._report.sites[leaf.site].outcome

    def outcomes(self, box: Box) -> list[tuple[str, int]]:
        """What is inside a box: (outcome, how many)."""
        found: dict[str, int] = {}
        for site in box.sites:
            outcome = self._report.sites[site].outcome
            found[outcome] = found.get(outcome, 0) + 1
        if box.refusals:
            found["refused"] = len(box.refusals)
        return list(found.items())


def _walk(box: Box) -> Iterator[tuple[str, Any]]:
    for child in box.children:
        if isinstance(child, Leaf):
            yield "leaf", child
        else:
            yield "open", child
            yield from _walk(child)
            yield "close", child
