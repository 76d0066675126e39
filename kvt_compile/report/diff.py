"""One site of a `GraphReport` -> its part of the graph before and after, as a diff.

      q: [2, 3, 197, 64] = getitem(permute, 0)
    - matmul: [2, 3, 197, 197] = matmul(q, transpose)
    + attention: = kvt.attention(q, k, v, ...)

Only the site's own nodes and their neighbours are listed, so nothing that merely ran in between gets in the way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvt_compile.report.facts import Findings, GraphReport, NodeReport, SiteNodes

Sign = Literal[" ", "-", "+"]


@dataclass(frozen=True)
class Line:
    sign: Sign
    text: str

    def __str__(self) -> str:
        return f"{self.sign} {self.text}"


def site_diff(graph: GraphReport, site: SiteNodes) -> tuple[Line, ...]:
    """The lines around one site; those of a site that is left dense are the same before and after."""
    before = _around(graph.before, site.before)
    if not site.after:
        return tuple(Line(" ", node.line) for node in before)
    after = _around(graph.after, site.after)
    kept = {node.name for node in before} & {node.name for node in after}
    # a neighbour seen on one side alone is no change, unless it was removed
    names_after, names_before = {n.name for n in graph.after}, {n.name for n in graph.before}
    old = [n.line for n in before if n.name in kept or n.name in site.before or n.name not in names_after]
    new = [n.line for n in after if n.name in kept or n.name in site.after or n.name not in names_before]
    return tuple(_compared(old, new))


def _around(nodes: Sequence[NodeReport], own: Sequence[str]) -> list[NodeReport]:
    """The site's nodes, what they read and what reads them, in the order they run; weights are left out."""
    inside = set(own)
    read = {name for node in nodes if node.name in inside for name in node.inputs}
    return [
        node
        for node in nodes
        if node.kind != "weight" and (node.name in inside or node.name in read or inside & set(node.inputs))
    ]


def _compared(old: list[str], new: list[str]) -> Iterator[Line]:
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            yield from (Line(" ", text) for text in old[i1:i2])
        else:
            yield from (Line("-", text) for text in old[i1:i2])
            yield from (Line("+", text) for text in new[j1:j2])


def diff_text(report: Findings) -> str:
    """Every rewritten site's diff under a header with its module path and line."""
    blocks = []
    for graph in report.graphs:
        for nodes in graph.sites:
            site = report.sites[nodes.site]
            if not nodes.after:
                continue
            k = f"{'own ' if site.keeps_own else ''}k = {site.topk}"
            head = f"@@ {site.module or '(top level)'}  {site.location}  {site.outcome}, {k} @@"
            blocks.append("\n".join([head, *(str(line) for line in site_diff(graph, nodes))]))
    return "\n\n".join(blocks)
