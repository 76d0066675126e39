"""`GraphReport` -> an SVG picture: one row a node in the order it runs, edges in lanes beside them, modules as frames.

    o   x_5    layer_norm      2x197x192
    |\\                                          |/ edge between neighbours, or in a lane where it is longer
    | o linear linear          2x197x576
    ...

The rows' order is the graph's own, so the layout needs no solver and no program besides this one (Graphviz does better
on small graphs and takes minutes on a thousand nodes).  Modules without an attention are one row each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from kvt_compile.report.facts import Findings, GraphReport
from kvt_compile.report.page.outline import Box, Leaf, outline

ROW, LANE, INDENT, WIDTH, MARGIN = 22, 9, 14, 560, 16
MAX_LANES = 14
_STYLE = """
svg { font: 12px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; background: #fff; }
text { fill: #1f2328; } .dim { fill: #59636e; } .title { font-weight: 600; font-size: 14px; }
.frame { fill: #f6f8fa; stroke: #d1d9e0; } .edge { fill: none; stroke: #8c959f; stroke-width: 1.2; }
.dot { fill: #8c959f; } .fused { fill: #1a7f37; } .scores-kept { fill: #0969da; } .dense { fill: #9a6700; }
.refused { fill: #cf222e; } rect.fused, rect.scores-kept, rect.dense, rect.refused { opacity: .14; }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; } text { fill: #e6edf3; } .dim { fill: #9198a1; }
  .frame { fill: #151b23; stroke: #3d444d; } .edge { stroke: #7d8590; } .dot { fill: #7d8590; }
  .fused { fill: #3fb950; } .scores-kept { fill: #58a6ff; } .dense { fill: #d29922; } .refused { fill: #f85149; }
  rect.fused, rect.scores-kept, rect.dense, rect.refused { opacity: .22; }
}
"""


@dataclass(frozen=True)
class _Row:
    depth: int
    label: str
    detail: str
    style: str
    leaves: tuple[int, ...]


def graph_svg(report: Findings) -> str:
    """The graphs of a report below each other.  Raises LookupError for a report without graphs."""
    if not report.graphs:
        raise LookupError("this report holds no graph: make it with kvt_compile.explain(...) or rewrite(...)")
    parts: list[str] = []
    y, width = MARGIN + ROW, 0
    for graph in report.graphs:
        text, height, wide = _graph(graph, report, y)
        parts.append(text)
        y, width = y + height + MARGIN, max(width, wide)
    width = max(width, MARGIN * 2 + 9 * len(report.summary))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" role="img" '
        f'aria-label="{escape(report.summary)}">\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="{MARGIN}" y="{MARGIN + 14}">{escape(report.summary)}</text>\n{"".join(parts)}</svg>\n'
    )


def _graph(graph: GraphReport, report: Findings, top: int) -> tuple[str, int, int]:
    """(SVG, height, width) of one graph below `top`."""
    view = outline(graph)
    rows: list[_Row] = []
    frames: list[tuple[int, int, int]] = []
    _rows(view.root, report, 0, rows, frames)
    places = [position for position, row in enumerate(rows) if row.leaves]  # a module's heading is no node
    at = {leaf: number for number, position in enumerate(places) for leaf in rows[position].leaves}
    lanes = assign_lanes({(at[a], at[b]) for a, b in view.edges if at[a] != at[b]})
    gutter = MARGIN + LANE * (max(lanes.values(), default=0) + 2)
    heading = bool(graph.graph or graph.name or len(report.graphs) > 1)
    first = top + 8 + ROW * heading

    def y(row: float) -> float:
        return first + ROW * row + ROW / 2

    out = [f'<text class="title" x="{MARGIN}" y="{top + 14}">{escape(graph.title)}</text>\n'] if heading else []
    for depth, start, stop in sorted(frames):
        x = gutter + 10 + INDENT * depth
        out.append(
            f'<rect class="frame" x="{x}" y="{first + ROW * start + 1}" width="{WIDTH - INDENT * depth * 2}" '
            f'height="{ROW * (stop - start) - 2}" rx="5"/>\n'
        )
    for (a, b), lane in sorted(lanes.items()):
        out.append(f'<path class="edge" d="{_curve(gutter, y(places[a]), y(places[b]), lane)}"/>\n')
    for position, row in enumerate(rows):
        x = gutter + 18 + INDENT * row.depth
        if row.style:
            out.append(
                f'<rect class="{row.style}" x="{x - 5}" y="{y(position) - ROW / 2 + 1}" rx="4" '
                f'width="{gutter + WIDTH - x - INDENT * row.depth}" height="{ROW - 2}"/>\n'
            )
        if row.leaves:
            out.append(f'<circle class="dot {row.style}" cx="{gutter}" cy="{y(position)}" r="3.5"/>')
        out.append(
            f'<text x="{x}" y="{y(position) + 4}">{escape(_cut(row.label, 44))} '
            f'<tspan class="dim">{escape(row.detail)}</tspan></text>\n'
        )
    return "".join(out), first - top + ROW * len(rows), gutter + 10 + WIDTH + MARGIN


def _rows(box: Box, report: Findings, depth: int, rows: list[_Row], frames: list[tuple[int, int, int]]) -> None:
    for child in box.children:
        if isinstance(child, Leaf):
            rows.append(_leaf_row(child, report, depth))
        elif child.sites or child.refusals:
            start = len(rows)
            rows.append(_Row(depth, child.label, "", "", ()))
            _rows(child, report, depth + 1, rows, frames)
            frames.append((depth, start, len(rows)))
        else:
            numbers = tuple(leaf.number for leaf in child.leaves)
            rows.append(_Row(depth, child.label, f"{len(numbers)} operations", "", numbers))


def _leaf_row(leaf: Leaf, report: Findings, depth: int) -> _Row:
    node = leaf.node
    label = f"{leaf.module} {node.target}" if leaf.module else node.target
    shape = f"{leaf.own_name}  " if leaf.own_name else ""
    shape += "×".join(map(str, node.shape)) if node.shape else ""
    style = ""
    if leaf.refusal is not None:
        style = "refused"
    elif leaf.site is not None:
        style = report.sites[leaf.site].outcome
        if leaf.anchor:
            site = report.sites[leaf.site]
            shape += f"  {site.outcome}" + (
                "" if site.topk is None else f", {'own ' if site.keeps_own else ''}k = {site.topk}"
            )
    return _Row(depth, label, shape, style, (leaf.number,))


def assign_lanes(edges: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Edge -> lane: 0 between neighbours, else the first lane (from 1) that is free over all rows it passes; short ones
    choose first.  Edges from one row share their lane.  At most MAX_LANES: what comes after shares the last."""
    lanes: dict[tuple[int, int], int] = {}
    taken: list[list[tuple[int, int, int]]] = []
    for a, b in sorted(edges, key=lambda edge: (abs(edge[1] - edge[0]), edge)):
        if b - a == 1:
            lanes[a, b] = 0
            continue
        low, high = min(a, b), max(a, b)
        for lane, passing in enumerate(taken):  # noqa: B007 - the lane that is found is used below
            if all(source == a or high <= start or stop <= low for start, stop, source in passing):
                break
        else:
            lane = len(taken)
            if lane < MAX_LANES:
                taken.append([])
            else:
                lane = MAX_LANES - 1
        taken[lane].append((low, high, a))
        lanes[a, b] = lane + 1
    return lanes


def _curve(x: float, start: float, stop: float, lane: int) -> str:
    if lane == 0:
        return f"M{x} {start}V{stop}"
    left = x - LANE * lane
    bend = min(6.0, abs(stop - start) / 2)
    return (
        f"M{x} {start}H{left + bend}Q{left} {start} {left} {start + bend}"
        f"V{stop - bend}Q{left} {stop} {left + bend} {stop}H{x}"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
