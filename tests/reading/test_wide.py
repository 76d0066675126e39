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
    "a bias in float32, then wide": lambda s: (s + FAR).double(),
    "differences of times, rounded": lambda s: s + (TIMES[:, None] - TIMES).float(),
}
KEPT: dict[str, Scores] = {
    "a number there and back": lambda s: s.double() + 1e9 - 1e9,
    "times": lambda s: s + TIMES[:, None] - TIMES,
    "compared with times": lambda s: s.masked_fill(s + TIMES < TIMES[:, None], -9.0),
    "a mask and a number": lambda s: s.double() + FAR.double() - 1e9,
    "chosen from times": lambda s: torch.where(MASK, TIMES, s.double()),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    assert outcome(Weighed(lambda s: FUSED[name](s).softmax(-1).float())).startswith("fused")


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert outcome(Weighed(lambda s: KEPT[name](s).softmax(-1).float())) == "scores-kept"
