"""Scores that a model goes on with in float64: a kernel that has them in float32 is for scales and masks alone."""

from __future__ import annotations

import pytest
import torch
from rewritten import FAR, MASK, N, Scores, Weighed, outcome

TIMES = 1.7e9 + torch.arange(N).double()
FUSED: dict[str, Scores] = {
    "scaled": lambda s: s.double() * 0.125,
    "masked": lambda s: s.double().masked_fill(MASK, -torch.inf),
    "scaled and masked": lambda s: torch.where(MASK, -1e9, s.double() / 3),
    "compared with a number that float32 has": lambda s: torch.where(s.double() > 0.5, s, -s),
    "compared in float32": lambda s: torch.where(s > torch.full((N,), 0.1), s, -s),
    "compared with a tensor of no axis": lambda s: torch.where(s > torch.tensor(0.1, dtype=torch.float64), s, -s),
    "a bias in float32, then wide": lambda s: (s + FAR).double(),
    "differences of times, rounded": lambda s: s + (TIMES[:, None] - TIMES).float(),
}
KEPT: dict[str, Scores] = {
    "a number there and back": lambda s: s.double() + 1e9 - 1e9,
    "times": lambda s: s + TIMES[:, None] - TIMES,
    "compared with times": lambda s: s.masked_fill(s + TIMES < TIMES[:, None], -9.0),
    "a mask and a number": lambda s: s.double() + FAR.double() - 1e9,
    "compared with a number that float32 has not": lambda s: torch.where(s.double() > 0.1, s, -s),
    "compared with a tensor of one": lambda s: torch.where(s >= torch.full((N,), 0.1, dtype=torch.float64), s, -s),
    "equal to one of many": lambda s: s.masked_fill(s == torch.tensor([[2**24 + 1.0] * N], dtype=torch.float64), 0.0),
    "chosen from times": lambda s: torch.where(MASK, TIMES, s.double()),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    assert outcome(Weighed(lambda s: FUSED[name](s).softmax(-1).float())).startswith("fused")


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert outcome(Weighed(lambda s: KEPT[name](s).softmax(-1).float())) == "scores-kept"
