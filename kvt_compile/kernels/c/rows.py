"""kvt::topk_softmax on a CPU: scores [outer, n, inner] -> weights of the kept keys along n, M rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvt_compile.kernels.c import launch
from kvt_compile.kernels.c.settings import Settings
from kvt_compile.kernels.op.spec import SoftmaxSpec

DTYPES = ("float32", "float64", "bfloat16", "float16")


def softmax(spec: SoftmaxSpec, settings: Settings, scores: Tensor, dim: int, topk: int, dtype: torch.dtype) -> Tensor:
    """Weights, contiguous, shaped like `scores`, in `dtype`."""
    scores = scores.contiguous()
    weights = torch.empty(scores.shape, dtype=dtype)
    if scores.numel():
        _call(spec, settings, "kvt_softmax", dim, topk, scores, None, weights)
    return weights


def softmax_backward(
    spec: SoftmaxSpec, settings: Settings, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """w * (g - sum(w * g)) along `dim`, contiguous, in `input_dtype`."""
    grad, weights = grad.contiguous(), weights.contiguous()
    result = torch.empty(weights.shape, dtype=input_dtype)
    if weights.numel():
        _call(spec, settings, "kvt_softmax_backward", dim, 1, weights, grad, result)
    return result


def _call(
    spec: SoftmaxSpec,
    settings: Settings,
    entry: str,
    dim: int,
    topk: int,
    source: Tensor,
    grad: Tensor | None,
    output: Tensor,
) -> None:
    n = source.shape[dim] if source.dim() else 1
    launch.kernel(spec, settings).call(
        entry,
        {
            "input": source.data_ptr(),
            "grad": 0 if grad is None else grad.data_ptr(),
            "output": output.data_ptr(),
            "outer": math.prod(source.shape[:dim]),
            "n": n,
            "inner": math.prod(source.shape[dim + 1 :]),
            "topk": min(topk, n),
            "threads": torch.get_num_threads(),
        },
    )
