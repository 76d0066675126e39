"""Every selector -> a drawing of its map for docs/selection.md, and the command that writes them: `make drawings`.

Left, where tokens stand on a grid: the grid, one query outlined, what it keeps filled; boxes above are tokens before
the grid.  Right: a row for each query, a column for each key, filled where the key is kept; one map a head where heads
differ.  What is kept is what the reference lowering keeps, of numbers that are the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from places import TESTS
from torch import Tensor

import kvt_compile
from kvt_compile import select
from kvt_compile.select.values import Selector

IMAGES = TESTS.parent / "docs" / "images"
HEADS, DIM = 4, 4
KEPT, DROPPED, QUERY, INK = "#2f6fb5", "#e4e7eb", "#e6261f", "#57606a"
GAP = 14
"""Between parts of a drawing, in pixels."""


@dataclass(frozen=True)
class Drawing:
    """A selection of a few tokens."""

    selection: str | Selector
    grid: tuple[int, ...]
    prefix: int = 0
    query: int = 0
    """Of the left part."""
    heads: int = 1
    """Whose maps are drawn."""

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.prefix


def even_places(q: Tensor, k: Tensor) -> Tensor:
    """Scores of a learned selector, here: the nearer the better, of every other key."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (-(i - j).abs().double() - 100.0 * (j % 2)).expand(*q.shape[:2], -1, -1)


DRAWINGS = {
    "topk": Drawing("topk(4)", (18,)),
    "mass": Drawing("mass(0.8)", (18,)),
    "window": Drawing("window(3) | prefix", (5, 7), 1, query=21),
    "window_dilated": Drawing("window(3, dilation=2)", (6, 7), query=23),
    "window_causal": Drawing("window(4, causal=True) | sinks(1)", (18,)),
    "halo": Drawing("halo((2, 3), 1)", (6, 7), query=23),
    "regions": Drawing("regions(2, (2, 3)) | prefix", (6, 6), 1, query=1, heads=2),
    "keys": Drawing("keys(3)", (18,), heads=2),
    "heads": Drawing("heads(2)", (12,), heads=4),
    "given": Drawing(select.given(even_places) & select.topk(3), (18,)),
    "shifted": Drawing("shifted(3)", (18,), heads=4),
    "sinks": Drawing("sinks(2)", (18,)),
    "prefix": Drawing("window(3) | prefix", (17,), 1),
}


def path_of(name: str) -> Path:
    return IMAGES / f"select_{name}.svg"


def kept(x: Drawing) -> Tensor:
    """bool `[HEADS, tokens, tokens]`"""
    n = torch.arange(HEADS * x.tokens * DIM, dtype=torch.float64).view(1, HEADS, x.tokens, DIM)
    q, k = 1.5 * torch.sin(1.0 + 12.9898 * n), 1.5 * torch.sin(2.0 + 78.233 * n)
    values = torch.eye(x.tokens, dtype=torch.float64).expand(1, HEADS, -1, -1)
    out = kvt_compile.attention(
        q, k, values, select=x.selection, grid=x.grid, prefix=x.prefix, scale=1.0, lowering="reference"
    )
    found: Tensor = out[0] != 0
    return found


def svg(x: Drawing) -> str:
    """The drawing."""
    found, parts, left = kept(x), [], 1
    if len(x.grid) > 1:
        part, width = _grid(x, found[0, x.query], left)
        parts, left = part, left + width + GAP
    for head in range(x.heads):
        parts += _map(found[head], left, f"head {head}" if x.heads > 1 else "")
        left += x.tokens * 6 + GAP
    height = 2 + max([16 + 6 * x.tokens, *([16 * x.grid[0] + 26] if len(x.grid) > 1 else [])])
    width = left - GAP + 2
    style = 'font-family="sans-serif" font-size="10"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" {style}>'
    said = str(x.selection).replace("&", "&amp;")
    return "\n".join([head, f"<title>{said}</title>", *parts, "</svg>"]) + "\n"


def _grid(x: Drawing, row: Tensor, left: int) -> tuple[list[str], int]:
    rows, columns = x.grid
    cells = [(left + 9 * n, 5, 7, bool(row[n]), n) for n in range(x.prefix)]
    cells += [
        (left + 16 * (n % columns), 18 + 16 * (n // columns), 15, bool(row[n + x.prefix]), n + x.prefix)
        for n in range(rows * columns)
    ]
    parts = []
    for across, down, size, filled, token in cells:
        edge = f' stroke="{QUERY}" stroke-width="2"' if token == x.query else ""
        fill = KEPT if filled else DROPPED
        parts.append(f'<rect x="{across}" y="{down}" width="{size}" height="{size}" fill="{fill}"{edge}/>')
    return parts, 16 * columns


def _map(found: Tensor, left: int, name: str) -> list[str]:
    size = 6 * len(found)
    parts = [f'<text x="{left}" y="11" fill="{INK}">{name}</text>'] if name else []
    parts.append(f'<rect x="{left}" y="16" width="{size}" height="{size}" fill="{DROPPED}"/>')
    runs = []
    for i, row in enumerate(found.tolist()):
        starts = [j for j, x in enumerate(row) if x and (j == 0 or not row[j - 1])]
        ends = [j + 1 for j, x in enumerate(row) if x and (j + 1 == len(row) or not row[j + 1])]
        pairs = zip(starts, ends, strict=True)
        runs += [f"M{left + 6 * a} {16 + 6 * i}h{6 * (b - a)}v6H{left + 6 * a}z" for a, b in pairs]
    return [*parts, f'<path fill="{KEPT}" d="{"".join(runs)}"/>']


def main() -> None:
    """Write every drawing, and remove those of selectors that are gone."""
    for stale in set(IMAGES.glob("select_*.svg")) - {path_of(name) for name in DRAWINGS}:
        stale.unlink()
    for name, drawing in DRAWINGS.items():
        path_of(name).write_text(svg(drawing), encoding="utf-8")
        print(path_of(name).name)


if __name__ == "__main__":
    main()
