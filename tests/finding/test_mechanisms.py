"""Mechanisms around attention: every softmax(Q Kᵀ) V inside is found, what is none is left alone with its reason, and
at k = N the model is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mechanism_models as models
import pytest
import torch
from torch import Tensor, nn

import kvt_compile

GATE = "its weights are not multiplied with values by a matrix product"


@dataclass(frozen=True)
class Mechanism:
    """`found` has the tier and the numbers of heads, queries and keys of every site; `left` the reasons of the rest."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    found: list[tuple[str, int, int, int]]
    left: list[str] = field(default_factory=list)
    why: str = ""
    """For a site that keeps its map."""

    def __str__(self) -> str:
        return self.id


MECHANISMS = [
    Mechanism("gate of a head", models.GatedAttention, (2, 9, 24), [("fused", 4, 9, 9)]),
    Mechanism("gate of a feature", lambda: models.GatedAttention(wide=True), (2, 9, 24), [("fused", 4, 9, 9)]),
    # the gates are softmaxes over heads: of the token, or of a layer of it
    Mechanism("mixture of heads", models.MixtureOfHeads, (2, 9, 24), [("fused", 6, 9, 9)], [GATE] * 4),
    Mechanism("heads by norm", models.NormedHeads, (2, 9, 24), [("fused", 6, 9, 9)], [GATE]),
    Mechanism("varied windows", models.VariedWindows, (2, 16, 8, 12), [("fused", 2, 16, 16)]),
    Mechanism(
        "windows and linear", models.LinearAndWindows, (2, 16, 6, 7), [("fused", 2, 16, 16)],
        ["between the products stands s: nothing that is understood normalises its rows"],
    ),
    Mechanism(
        "core context", models.CoreContext, (2, 17, 16), [("scores-kept", 2, 3, 4), ("fused", 2, 17, 20)],
        why="also read by",  # one pooling for keys and values
    ),
    Mechanism(
        "talking heads", models.TalkingHeads, (2, 9, 16), [("scores-kept", 4, 9, 9)], why="linear between the two"
    ),
    Mechanism(
        "heads mixed after", lambda: models.TalkingHeads(before=False), (2, 9, 16), [("scores-kept", 4, 9, 9)],
        why="linear between the two",
    ),
    Mechanism(
        "differential heads", models.DifferentialHeads, (2, 9, 16), [("fused", 2, 9, 9)] * 2
    ),
    Mechanism("differential outputs", models.DifferentialOutputs, (2, 9, 16), [("fused", 2, 9, 9)] * 2),
]  # fmt: skip


def outcome(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and all gradients."""
    x = x.detach().requires_grad_()
    out = module(x)
    out = list(out) if isinstance(out, tuple) else [out]
    slope = torch.linspace(-1, 1, out[0].numel(), dtype=x.dtype).view_as(out[0])
    wanted = [x, *module.parameters()]
    return out + [g for g in torch.autograd.grad((out[0] * slope).sum(), wanted, allow_unused=True) if g is not None]


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_every_attention_inside_is_found_and_nothing_else(case: Mechanism) -> None:
    torch.manual_seed(0)
    module, x = case.make().double(), torch.randn(case.shape, dtype=torch.float64)
    result = kvt_compile.rewrite(module, x, topk=1.0, force_rewrite=True, lowering="aten")
    report = result.report
    assert [(s.outcome, s.heads, s.queries, s.keys) for s in report.sites] == case.found
    assert all(case.why in site.reason for site in report.sites if site.outcome == "scores-kept")
    reasons = [refusal.reason for refusal in report.refusals]
    assert len(reasons) == len(case.left)
    assert all(found.startswith(wanted) for found, wanted in zip(reasons, case.left, strict=True)), reasons
    found, expected = outcome(result.module, x), outcome(module, x)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
