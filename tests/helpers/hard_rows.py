"""Rows of scores that are hard to select from, and the check of weights against the reference; for every lowering."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvt_compile.kernels.plain.reference import reference_softmax

INF = math.inf


def assert_kept(weights: Callable[[Tensor, int], Tensor], scores: Tensor, topk: int) -> None:
    """Weights and, where a weight can be told from zero, the kept set."""
    exact, _, _, kept = reference_softmax(scores.double(), topk)
    actual = weights(scores, topk)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    seen = kept & (exact > 1e-30)
    assert torch.equal((actual > 0)[seen], kept[seen])
    assert not (actual[~kept] > 0).any()


ROWS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda m, n: torch.randn(m, n),
    "skewed": lambda m, n: torch.randn(m, n).exp(),
    "bimodal": lambda m, n: torch.randn(m, n) + 6.0 * torch.randint(0, 2, (m, n)),
    "two values": lambda m, n: torch.randint(0, 2, (m, n)).float(),
    "constant": lambda m, n: torch.full((m, n), 0.3),
    "bfloat16 rounded": lambda m, n: torch.randn(m, n).bfloat16().float(),
    "signed zeros": lambda m, n: torch.randint(-1, 2, (m, n)).float() * 0.0,
    "denormal": lambda m, n: torch.randn(m, n) * 1e-41,
    "huge": lambda m, n: torch.randn(m, n) * 1e38,
    "one outlier": lambda m, n: torch.cat((torch.randn(m, n - 1), torch.full((m, 1), 1e30)), -1),
    "masked": lambda m, n: torch.where(torch.rand(m, n) > 0.5, torch.randn(m, n), -INF),
    "masked by the lowest number": lambda m, n: torch.where(torch.rand(m, n) > 0.5, torch.randn(m, n), -3.4e38),
    "masked by -100": lambda m, n: torch.where(torch.rand(m, n) > 0.7, torch.randn(m, n), -100.0),
    "causal": lambda m, n: torch.randn(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -INF),
    "powers": lambda m, n: 2.0 ** torch.randint(-140, 100, (m, n)),
    "neighbours": lambda m, n: 1.0 + torch.arange(n).float().expand(m, n) * 2**-23,
    "nothing valid": lambda m, n: torch.full((m, n), -INF),
}
"""Name -> m rows of n scores."""
