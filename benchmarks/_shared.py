"""What the CPU's and the GPU's attention benchmarks share: the rivals, a training step, medians taken in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvt_compile.kernels.tune import timing

Run = Callable[[], object]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def eager_kvt(q: Tensor, k: Tensor, v: Tensor, topk: int) -> Tensor:
    """The official algorithm (damo-cv/KVT): a mask of zeros, ones scattered where topk points, softmax of the rest."""
    attn = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    mask = torch.zeros_like(attn)
    index = torch.topk(attn, k=topk, dim=-1, largest=True)[1]
    mask.scatter_(-1, index, 1.0)
    attn = torch.where(mask > 0, attn, torch.full_like(attn, float("-inf")))
    return torch.softmax(attn, dim=-1) @ v


def step(attention: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Run:
    """Forward and backward."""
    return lambda: torch.autograd.grad(attention(), leaves, grad)


def medians(seconds: float, *runs: Run) -> list[float]:
    """Median milliseconds of each by the wall clock, taking turns until `seconds` have passed, at least five turns."""
    return timing.medians(runs, timing.WallClock(), seconds, at_least=5, at_most=1_000_000)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
