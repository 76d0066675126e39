"""Op arguments -> nothing, or an error that names the dimension.  Runs in every call and every fake call: plain
comparisons, no allocation, message built only when needed.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from kvt_compile.kernels.op.arguments import (
    AttentionArguments,
    BackwardArguments,
    SoftmaxArguments,
    SoftmaxBackwardArguments,
)
from kvt_compile.kernels.op.spec import check_expressions


def _fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"kvt::{op}: {message}")


def _check_tolerance(op: str, tolerance: float) -> None:
    if not 0.0 <= tolerance < 1.0:
        _fail(op, f"tolerance is {tolerance}, expected a number in [0, 1)")


def check_attention(a: AttentionArguments) -> None:
    """Raises ValueError unless q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hk, Nk, Dv]` and the rest fit."""
    q, k, v, captured = a.q, a.k, a.v, a.captured or ()
    if not (q.dim() == k.dim() == v.dim() == 4):
        _fail("attention", f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions, expected 4 each (B, H, N, D)")
    batch, heads, _, head_dim = q.shape
    k_batch, kv_heads, keys, k_dim = k.shape
    v_batch, v_heads, v_keys, _ = v.shape
    if not (batch == k_batch == v_batch):
        _fail("attention", f"batch size B differs: q has {batch}, k has {k_batch}, v has {v_batch}")
    if kv_heads != v_heads:
        _fail("attention", f"number of heads Hk differs: k has {kv_heads}, v has {v_heads}")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        _fail("attention", f"q has Hq={heads} heads, which is no multiple of the Hk={kv_heads} heads of k and v")
    if keys != v_keys:
        _fail("attention", f"number of keys Nk differs: k has {keys}, v has {v_keys}")
    if head_dim != k_dim:
        _fail("attention", f"head size D differs: q has {head_dim}, k has {k_dim}")
    if q.dtype != k.dtype:
        _fail("attention", f"dtype differs: q is {q.dtype}, k is {k.dtype}")
    if not (q.is_floating_point() and v.is_floating_point()):
        _fail("attention", f"q, k and v must be floating point: q is {q.dtype}, v is {v.dtype}")
    if not (q.device == k.device == v.device):
        _fail("attention", f"device differs: q is on {q.device}, k on {k.device}, v on {v.device}")
    for slot, tensor in enumerate(captured):
        # like torch's own operators, a number in a 0-d CPU tensor may join tensors of any device
        if tensor.device != q.device and tensor.dim():
            _fail("attention", f"device differs: q is on {q.device}, captured tensor {slot} on {tensor.device}")
    if a.topk < 1:
        _fail("attention", f"topk is {a.topk}, expected at least 1")
    _check_tolerance("attention", a.tolerance)
    if not 0.0 <= a.dropout_p <= 1.0:
        _fail("attention", f"dropout_p is {a.dropout_p}, expected a probability in [0, 1]")
    if a.dropout_p > 0.0 and a.seed is None:
        _fail("attention", f"dropout_p is {a.dropout_p}, which needs a seed (an int64 tensor of one element)")
    if a.seed is not None and (a.seed.dtype != torch.int64 or a.seed.numel() != 1):
        _fail("attention", f"seed is {a.seed.dtype} of shape {tuple(a.seed.shape)}, expected one int64 element")
    check_expressions(a.score, a.weight, tuple([c.dim() for c in captured]), len(a.sizes or ()))


def check_backward(a: BackwardArguments) -> None:
    """Raises ValueError unless the saved tensors are those of a forward on q and v."""
    captured, needs_grad = a.captured or (), a.needs_grad
    rows, result = a.q.shape[:3], (*a.q.shape[:3], a.v.shape[3])
    for name, tensor, shape in (
        ("grad_out", a.grad_out, result),
        ("out", a.out, result),
        ("logsumexp", a.logsumexp, rows),
        ("threshold", a.threshold, rows),
    ):
        if tensor.shape != shape:
            _fail("attention_backward", f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if len(needs_grad) != 3 + len(captured):
        _fail(
            "attention_backward",
            f"needs_grad has {len(needs_grad)} entries, expected one for each of q, k, v and {len(captured)} captured",
        )
    for slot, (tensor, need) in enumerate(zip(captured, needs_grad[3:], strict=True)):
        if need and not tensor.is_floating_point():
            _fail("attention_backward", f"captured tensor {slot} is {tensor.dtype}, which cannot have a gradient")


def check_softmax(a: SoftmaxArguments) -> int:
    """The dimension counted from the front.  Raises IndexError or ValueError."""
    if a.topk < 1:
        _fail("topk_softmax", f"topk is {a.topk}, expected at least 1")
    _check_tolerance("topk_softmax", a.tolerance)
    return _check_rows(a.scores, a.dim, a.dtype)


def check_softmax_backward(a: SoftmaxBackwardArguments) -> int:
    """The dimension counted from the front.  Raises IndexError or ValueError."""
    return _check_rows(a.weights, a.dim, a.input_dtype)


def _check_rows(scores: Tensor, dim: int, dtype: torch.dtype) -> int:
    dims = max(scores.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"kvt::topk_softmax: dim is {dim}, expected a dimension of {scores.dim()}-d scores")
    if not (scores.is_floating_point() and dtype.is_floating_point):
        _fail("topk_softmax", f"scores and result must be floating point: {scores.dtype} -> {dtype}")
    return dim % dims
