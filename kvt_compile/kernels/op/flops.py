"""Shapes -> floating point operations, for torch.utils.flop_counter.

Counted as torch counts SDPA: the matrix products only, of the pairs of query and key that a selection allows; where
tensors decide which these are, of as many as they choose.  Ranking saves nothing: what is ranked is multiplied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.select.share import kept_share

Shape = Sequence[int]


def product_flops(q: Shape, columns: int) -> int:
    """Of one product with `[B, Hq, Nq, Nk]` scores: 2 * B * Hq * Nq * (contracted size) * (columns)."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * width * columns


def attention_flops(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """s = Q Kt and out = w V."""
    dense = product_flops(q, k[2]) + product_flops((*q[:3], v[3]), k[2])
    return selected_flops(dense, q, k, args[10:], kwargs)


def selected_flops(dense: int, q: Shape, k: Shape, last: Sequence[Any], named: dict[str, Any]) -> int:
    """What is left of so many where a selection says so; `last` and `named` have the arguments select, grid, prefix."""
    given = dict(zip(("select", "grid", "prefix"), last, strict=False)) | named
    selection = selection_of(given.get("select", ""), given.get("grid"), given.get("prefix", 0), q[2], k[2])
    if selection is None or selection.allowed is None:
        return dense
    share = kept_share(selection.allowed, selection.geometry, q[1], q[2], k[2])
    return dense if share is None else round(dense * share)


def attention_backward_flops(
    grad_out: Shape, q: Shape, k: Shape, v: Shape, captured: Sequence[Shape], *args: Any, **kwargs: Any
) -> int:
    """s again; dV; dO Vt for every other gradient; dQ; dK: those that are needed."""
    needs_grad = kwargs.get("needs_grad", args[9] if len(args) >= 10 else (True,) * (3 + len(captured)))
    need_q, need_k, need_v, *need_captured = map(bool, needs_grad)
    by_head, by_value = product_flops(q, k[2]), product_flops(grad_out, k[2])
    through_scores = need_q or need_k or any(need_captured)
    dense = by_head * (1 + need_q + need_k) + by_value * (need_v + through_scores)
    return selected_flops(dense, q, k, args[12:], kwargs)


def softmax_flops(*args: Any, **kwargs: Any) -> int:
    """No matrix product, so nothing, as for torch's own softmax."""
    return 0


def register() -> None:
    """Tell torch's counter."""
    register_flop_formula(torch.ops.kvt.attention)(attention_flops)
    register_flop_formula(torch.ops.kvt.attention_backward)(attention_backward_flops)
    register_flop_formula([torch.ops.kvt.topk_softmax, torch.ops.kvt.topk_softmax_backward])(softmax_flops)
