"""Sizes of a site -> what it costs as dense attention and as k-NN attention.

    dense, written out    memory 2 B H Nq Nk e           FLOPs 2 B H Nq Nk (D + Dv)
    k-NN, fused           memory 2 B H Nq 4              FLOPs 2 B H Nq (Nk D + k Dv)

Memory is what lies between the products: the score and the weight map, or the logsumexp and the threshold of each row.
FLOPs are those of the two products that the result depends on (exact k-NN attention needs every score, a selection
those that it allows); a lowering may multiply the zeros as well.  A site whose scores are kept costs what the dense one
does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy

from kvt_compile.report.facts import SiteReport

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """Bytes and floating point operations; `knn_*` is None where the site is left dense."""

    dense_bytes: int
    knn_bytes: int | None
    dense_flops: int
    knn_flops: int | None
    per_example: bool
    """Whether a dynamic size was counted as 1, so that the numbers are those of one example."""


def cost(site: SiteReport) -> Cost | None:
    """None when a size is no number and does not become one with every dynamic size at 1."""
    values = [_number(x) for x in (site.batch, site.heads, site.queries, site.keys, site.head_dim, site.value_dim)]
    if any(value is None for value in values):
        return None
    batch, heads, queries, keys, head_dim, value_dim = (int(value or 0) for value in values)
    rows = batch * heads * queries
    width = _BYTES.get(site.dtype, 4)
    kept = _number(site.topk) if site.topk is not None else None
    summed = keys if kept is None or site.outcome == "scores-kept" else min(kept, keys)
    scored = keys if site.kept is None else keys * site.kept
    dense_bytes = 2 * rows * keys * width
    knn_bytes = dense_bytes if site.outcome == "scores-kept" else 2 * rows * max(4, width if width == 8 else 4)
    return Cost(
        dense_bytes=dense_bytes,
        knn_bytes=None if site.topk is None else knn_bytes,
        dense_flops=2 * rows * keys * (head_dim + value_dim),
        knn_flops=None if kept is None else round(2 * rows * (scored * head_dim + min(summed, scored) * value_dim)),
        per_example=any(not isinstance(x, int) for x in (site.batch, site.heads, site.queries, site.keys)),
    )


def _number(size: int | str) -> int | None:
    """`4*s0` -> 4; a share of dynamic keys (`0.5 of s0`) has no number."""
    if isinstance(size, int):
        return size
    if not re.fullmatch(r"[\w\s*+/().-]+", size) or " of " in size:
        return None
    try:
        expression = sympy.sympify(size)
        value = expression.subs(dict.fromkeys(expression.free_symbols, 1))
        return int(value)
    except (sympy.SympifyError, TypeError, ValueError):
        return None


def bytes_text(count: int | None) -> str:
    """1572864 -> `1.5 MB` (powers of 1000)."""
    return "—" if count is None else _scaled(count, "B")


def flops_text(count: int | None) -> str:
    """2.1e9 -> `2.1 GFLOP`."""
    return "—" if count is None else _scaled(count, "FLOP")


def _scaled(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}"
