"""Op arguments -> nothing, or an error that names the argument.  Runs in every call and every fake call: plain
comparisons, no allocation, message built only when needed.

Lowerings take pointers and trust what stands here: dtype, device and layout of every tensor are checked, of those that
a backward gets back too, since a saved program may hold any call.  Strides may be anything.
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
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.op.spec import check_expressions

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
CAPTURED = FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_NAMES = "float16, bfloat16, float32 or float64"


def _fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"kvt::{op}: {message}")


def _check_tolerance(op: str, tolerance: float) -> None:
    if not 0.0 <= tolerance < 1.0:
        _fail(op, f"tolerance is {tolerance}, expected a number in [0, 1)")


def _check_memory(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """A tensor with strides, on the device of the first one."""
    if tensor.layout is not torch.strided:
        _fail(op, f"{name} has layout {tensor.layout}, expected {torch.strided} (use to_dense())")
    if tensor.device != device:
        _fail(op, f"device differs: {name} is on {tensor.device}, expected {device}")


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
    if q.dtype not in FLOATS or v.dtype not in FLOATS:
        _fail("attention", f"q, k and v must be floating point ({_NAMES}): q is {q.dtype}, v is {v.dtype}")
    device = q.device
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_memory("attention", name, tensor, device)
    for slot, tensor in enumerate(captured):
        if tensor.dtype not in CAPTURED:
            _fail("attention", f"captured tensor {slot} is {tensor.dtype}, expected a bool, an integer, or {_NAMES}")
        # like torch's own operators, a number in a 0-d CPU tensor may join tensors of any device
        number = not tensor.dim() and tensor.device.type == "cpu"
        _check_memory("attention", f"captured tensor {slot}", tensor, tensor.device if number else device)
    if a.topk < 1:
        _fail("attention", f"topk is {a.topk}, expected at least 1")
    _check_tolerance("attention", a.tolerance)
    if not 0.0 <= a.dropout_p <= 1.0:
        _fail("attention", f"dropout_p is {a.dropout_p}, expected a probability in [0, 1]")
    if a.dropout_p > 0.0 and a.seed is None:
        _fail("attention", f"dropout_p is {a.dropout_p}, which needs a seed (an int64 tensor of one element)")
    if a.seed is not None:
        if a.seed.dtype != torch.int64 or a.seed.layout is not torch.strided or a.seed.numel() != 1:
            _fail("attention", f"seed is {a.seed.dtype} of shape {tuple(a.seed.shape)}, expected one int64 element")
        _check_memory("attention", "seed", a.seed, device)
    if a.draw is not None and (len(a.draw) != 4 or any(isinstance(x, int) and x < 0 for x in a.draw)):
        _fail("attention", f"draw is {list(a.draw)}, expected four numbers of at least 0: first, per_b, per_h, per_i")
    for n, size in enumerate(a.sizes or ()):
        # it may be divided by; a call without rows or keys divides nothing, and a symbolic size is asked when it runs
        if isinstance(size, int) and size < 1 and 0 not in (batch, heads, q.shape[2], keys):
            _fail("attention", f"size n{n} is {size}, expected at least 1")
    check_expressions(a.score, a.weight, tuple([c.dim() for c in captured]), len(a.sizes or ()))
    if a.select:
        selection_of(a.select, a.grid, a.prefix, q.shape[2], keys)


def check_backward(a: BackwardArguments) -> None:
    """Raises ValueError unless the saved tensors are those of a forward on q and v."""
    captured, needs_grad = a.captured or (), a.needs_grad
    rows, result = a.q.shape[:3], (*a.q.shape[:3], a.v.shape[3])
    accumulate = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    for name, tensor, shape, dtype in (
        ("grad_out", a.grad_out, result, a.v.dtype),
        ("out", a.out, result, a.v.dtype),
        ("logsumexp", a.logsumexp, rows, accumulate),
        ("threshold", a.threshold, rows, accumulate),
    ):
        if tensor.shape != shape:
            _fail("attention_backward", f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.dtype != dtype:
            _fail("attention_backward", f"{name} is {tensor.dtype}, expected {dtype}")
        _check_memory("attention_backward", name, tensor, a.q.device)
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
    dim = _check_rows(a.weights, a.dim, a.input_dtype)
    if a.grad.shape != a.weights.shape:
        _fail("topk_softmax_backward", f"grad has shape {tuple(a.grad.shape)}, expected {tuple(a.weights.shape)}")
    if a.grad.dtype != a.weights.dtype:
        _fail("topk_softmax_backward", f"grad is {a.grad.dtype}, expected {a.weights.dtype}")
    _check_memory("topk_softmax_backward", "grad", a.grad, a.weights.device)
    return dim


def _check_rows(scores: Tensor, dim: int, dtype: torch.dtype) -> int:
    dims = max(scores.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"kvt::topk_softmax: dim is {dim}, expected a dimension of {scores.dim()}-d scores")
    if scores.dtype not in FLOATS or dtype not in FLOATS:
        _fail("topk_softmax", f"scores and result must be floating point ({_NAMES}): {scores.dtype} -> {dtype}")
    _check_memory("topk_softmax", "scores", scores, scores.device)
    return dim % dims
