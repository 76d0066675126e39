"""What the GPU tests run, in sizes that the interpreter cannot reach: test_triton_gpu.py looks at the numbers on a GPU,
test_triton_launch.py launches the same kernels without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from oracles import Case, floats
from torch import Tensor, nn

PLAIN = Case("plain", batch=1, heads=1, queries=7, keys=19, topk=6, value_dim=4)
LARGE = [
    PLAIN.but(id=f"{dtype}, N = {n}, D = {d}", dtype=dtype, heads=2, queries=n, keys=n, topk=n // 2,
              head_dim=d, value_dim=d, score=f"{d**-0.5}*s")
    for dtype in (torch.bfloat16, torch.float32)
    for n, d in ((197, 64), (256, 64), (257, 80), (577, 64), (1025, 128), (300, 256))
] + [
    PLAIN.but(id="bias", heads=3, batch=2, queries=197, keys=197, topk=100, head_dim=32, value_dim=32,
              score="0.17*s + c0[h, i, j]", captured=floats("heads", "queries", "keys")),
    PLAIN.but(id="causal, long", queries=700, keys=700, topk=64, head_dim=64, value_dim=64,
              score="where(le(j, i), 0.125*s, -oo)"),
    PLAIN.but(id="dropout, gqa", heads=4, kv_heads=2, queries=150, keys=333, topk=50, head_dim=64,
              value_dim=48, dropout_p=0.2),
]  # fmt: skip

SELECTED = [
    PLAIN.but(id=text, heads=4, kv_heads=2, queries=401, keys=401, topk=topk, head_dim=64, value_dim=64, dtype=dtype,
              score=score, captured=captured, select=text, grid=(20, 20), prefix=1)
    for text, topk, dtype, score, captured in (
        ("window(7) | prefix", 401, torch.bfloat16, "0.125*s", PLAIN.captured),
        ("window(7) | prefix", 401, torch.float32, "0.125*s + c0[h, i, j]", floats("heads", "queries", "keys")),
        ("window(9, dilation=2) | sinks(3)", 20, torch.bfloat16, "0.125*s", PLAIN.captured),
        ("halo(8, 0) | prefix", 401, torch.bfloat16, "0.125*s", PLAIN.captured),
        ("shifted(3) | prefix", 401, torch.float16, "where(le(j, i), 0.125*s, -oo)", PLAIN.captured),
        ("regions(3, 8) | prefix", 401, torch.bfloat16, "0.125*s", PLAIN.captured),
        ("keys(20) | window(5) | prefix", 401, torch.bfloat16, "0.125*s", PLAIN.captured),
        ("heads(2) & (window(9) | prefix)", 30, torch.float32, "0.125*s + c0[h, i, j]",
         floats("heads", "queries", "keys")),
        ("regions(0.25, 5, heads=all) | prefix", 30, torch.float32, "0.125*s", PLAIN.captured),
    )
]  # fmt: skip

TIES = [
    (dtype, low, high, keys)
    for dtype in (torch.float32, torch.bfloat16)
    for low, high in ((1, 2), (0, 2), (-3, 4))
    for keys in (17, 300)
]
"""Queries and keys of whole numbers low .. high - 1: products are exact, and most of them tie."""


def ties(dtype: torch.dtype, low: int, high: int, keys: int) -> Iterator[tuple[Case, list[Tensor]]]:
    """Such cases with their tensors, for few and for many kept keys."""
    for topk in (1, 4, 9, keys - 1, keys):
        torch.manual_seed(topk)
        q, k = (torch.randint(low, high, (2, 2, n, 8)).to(dtype) for n in (40, keys))
        yield PLAIN.but(dtype=dtype, topk=topk, score="s", keys=keys), [q, k, torch.randn(2, 2, keys, 8).to(dtype)]


IDENTITY = [(dtype, keys) for dtype in (torch.float32, torch.bfloat16, torch.float16) for keys in (197, 1024, 4096)]
"""Values that are the identity matrix, 256 columns at a time."""
IDENTITY_ROWS = 256
MEMORY = (1024, 4096, 16384)
ROWS = [(64, 12, 197, 197), (8, 4096), (3, 20_000)]


def attention(
    q: Tensor, k: Tensor, v: Tensor, topk: int, score: str = "0.125*s", captured: Sequence[Tensor] = ()
) -> Tensor:
    """One head of kvt::attention by the Triton lowering."""
    out: Tensor = torch.ops.kvt.attention(q, k, v, list(captured), score, "p", topk, [], 0.0, None, "triton")[0]
    return out


class Site(nn.Module):
    """One attention with a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 197, 197))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, 100, "0.125*s + c0[h, i, j]", [self.bias])


def inputs(seed: int = 0, device: Any = None) -> list[Tensor]:
    """q, k, v of `Site`."""
    torch.manual_seed(seed)
    return [torch.randn(2, 3, 197, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
