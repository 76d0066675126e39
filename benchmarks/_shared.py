"""What the CPU's and the GPU's attention benchmarks share: the rivals, a training step, medians taken in turns."""

from __future__ import annotations

import time
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


class ProcessorClock(timing.WallClock):
    """Processor time of the calling thread: what another program takes meanwhile does not count.  For one thread."""

    def milliseconds(self, run: Run) -> float:
        start = time.thread_time()
        run()
        return 1e3 * (time.thread_time() - start)


def medians(seconds: float, *runs: Run) -> list[float]:
    """Median milliseconds of each, taking turns until `seconds` have passed, at least five turns; processor time where
    torch has one thread, else by the wall clock."""
    clock = ProcessorClock() if torch.get_num_threads() == 1 else timing.WallClock()
    return timing.medians(runs, clock, seconds, at_least=5, at_most=1_000_000)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
