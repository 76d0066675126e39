"""Spec + sizes -> a call of it on CPU tensors whose shapes its own expressions ask for."""

from __future__ import annotations

import dataclasses

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.op.spec import KernelSpec

TABLE = 16
"""Entries of a dimension that is indexed by what a tensor holds."""


def call_of(
    spec: KernelSpec, queries: int, keys: int, batch: int = 2, heads: int = 2, kv_heads: int = 0, topk: int = 0
) -> AttentionCall:
    """A checked call: contiguous tensors, every n0, n1, ... is `batch`, half of the keys are kept.  Of a selection
    there are as many keys as queries: one token before a grid of one axis."""
    keys = queries if spec.select else keys
    kv_heads = kv_heads or heads
    q, k, v = (
        torch.randn(batch, h, n, d, dtype=torch.float32).to(getattr(torch, dtype))
        for h, n, d, dtype in (
            (heads, queries, spec.head_dim, spec.dtype),
            (kv_heads, keys, spec.head_dim, spec.dtype),
            (kv_heads, keys, spec.value_dim, spec.value_dtype),
        )
    )
    extents = {"b": batch, "h": heads, "i": queries, "j": keys}
    captured = [_captured(spec, n, extents, batch) for n in range(len(spec.captured))]
    seed = torch.tensor([7]) if spec.dropout else None
    return AttentionCall(
        spec, q, k, v, captured, topk or max(1, keys // 2), (batch,) * spec.sizes, 0.1 if spec.dropout else 0.0, seed,
        selection=selection_of(spec.select, (keys - 1,), 1, queries, keys),
    )  # fmt: skip


def without_gradients(call: AttentionCall) -> AttentionCall:
    """The call as the forward gets it."""
    return dataclasses.replace(call, spec=dataclasses.replace(call.spec, needs_grad=()))


def _captured(spec: KernelSpec, number: int, extents: dict[str, int], size: int) -> Tensor:
    loads = [x for x in (*spec.score_loads, *spec.weight_loads) if x.slot == number]
    shape = [max(_extent(x.index[dim], extents, size) for x in loads) for dim in range(spec.captured[number].ndim)]
    return torch.zeros(shape, dtype=getattr(torch, spec.captured[number].dtype))


def _extent(index: sympy.Expr, extents: dict[str, int], size: int) -> int:
    if str(index) in extents:
        return extents[str(index)]
    return size if "%" in language.to_text(index) else int(index) + 1 if index.is_Integer else TABLE
