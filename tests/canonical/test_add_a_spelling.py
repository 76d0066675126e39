"""The walk of docs/add_a_spelling.md: an operation kvt does not know, one line, and the site is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvt_compile
from kvt_compile.passes.canonical import meaning, spellings


class Odd(nn.Module):
    """Attention whose scores go through operations that are in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.fix(torch.frac(self.q(x) @ self.k(x).mT) * 4)
        return scores.softmax(-1) @ self.v(x)


def test_what_is_unknown_is_not_fused() -> None:
    report = explained()
    assert report.counts["fused"] == 0
    assert report.counts["scores-kept"] + report.counts["refusals"] == 1


def explained() -> kvt_compile.Report:
    return kvt_compile.explain(Odd(), torch.randn(2, 6, 8))


def test_one_line_each_makes_it_a_fused_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvt_compile.kernels.language import score

    # another name of a known operation, and a new pointwise function (any stand-in will do: nothing is computed here)
    monkeypatch.setitem(spellings.ALIASES, "fix", "tanh")
    monkeypatch.setitem(meaning.MEANINGS, "frac", lambda b, input: b.pointwise("frac", score.sin, input))
    spellings._functions.cache_clear()
    try:
        (site,) = explained().sites
    finally:
        monkeypatch.undo()
        spellings._functions.cache_clear()
    assert site.outcome == "fused"
    assert site.score == "tanh(4.0*sin(s))"
