"""kvt::topk_softmax on a GPU: scores [outer, n, inner] -> weights of the kept keys along n."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvt_compile.kernels.op.captured import surely
from kvt_compile.kernels.op.spec import SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch
from kvt_compile.kernels.triton.constants import constexprs
from kvt_compile.kernels.triton.launch import Launcher, kept


def softmax(
    launcher: Launcher, spec: SoftmaxSpec, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float
) -> Tensor:
    """Weights, contiguous, shaped like `scores`, in `dtype`."""
    scores = scores.contiguous()
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    keys = scores.shape[dim] if scores.dim() else 1
    _run(launcher, spec, "softmax", dim, (scores, out), tuple(kept(torch.sym_min(topk, keys), tolerance).values()))
    return out


def softmax_backward(
    launcher: Launcher, spec: SoftmaxSpec, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """w * (g - sum(w * g)) along `dim`, contiguous, in `input_dtype`."""
    out = torch.empty(weights.shape, dtype=input_dtype, device=weights.device)
    _run(launcher, spec, "softmax_backward", dim, (grad.contiguous(), weights.contiguous(), out), ())
    return out


def _run(
    launcher: Launcher, spec: SoftmaxSpec, part: str, dim: int, tensors: tuple[Tensor, ...], rest: tuple[int, ...]
) -> None:
    x = tensors[0]
    if not x.numel():
        return
    keys = x.shape[dim] if x.dim() else 1
    inner = math.prod(x.shape[dim + 1 :])
    count = x.numel() // keys
    index = "int32" if surely((x.numel() + 8192 * (inner + 1)) < 2**31) else "int64"
    kernel = launcher.kernel(spec, part)

    def launch(blocks: Blocks) -> None:
        constants = constexprs(part, blocks, index, None)
        programs = -(-count // blocks.rows)
        launcher.launch(kernel, programs, [*tensors, count, keys, inner, *rest], constants, blocks)

    with launcher.on(x):
        topk = rest[0] if rest else keys
        launch(launcher.chooser(Launch(spec, part, count, keys, 1, topk, x.device, lambda b: lambda: launch(b))))
