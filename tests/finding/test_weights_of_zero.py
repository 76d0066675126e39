"""Numerators that are 0 for some keys: their logarithm is in no model, so no gradient comes through its slope there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rewritten import MASK, N, Scores, Weighed, inputs, outcome
from torch import Tensor

import kvt_compile


def over_its_sum(e: Tensor) -> Tensor:
    return e / e.sum(-1, True)


NUMERATORS: dict[str, Scores] = {
    "squares": lambda s: s**2,
    "sizes": lambda s: s.abs(),
    "sizes to a power": lambda s: s.abs() ** 1.5,
    "squares of masked scores": lambda s: (s * MASK).square(),
    "squares of a tangent": lambda s: s.tanh() ** 2,
    "weights times squares": lambda s: s.softmax(-1) * s**2,
    "a sigmoid that underflows": lambda s: (s * 60).sigmoid(),
    "one less a sigmoid": lambda s: 1 - (s * 6).sigmoid(),
    "one more than a tangent": lambda s: 1 + (s * 10).tanh(),
    "exponentials times a sigmoid": lambda s: s.exp() * (-60 * s).sigmoid(),
    "ReLU": lambda s: s.relu() + 0.0,
    "squares of ReLU": lambda s: s.relu() ** 2,
}
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda p: p**2,
    "sizes": lambda p: p.abs(),
    "a sigmoid that underflows": lambda p: (100 * p).sigmoid(),
    "ReLU": lambda p: p.relu(),
}


@pytest.mark.parametrize("name", NUMERATORS)
def test_a_numerator_of_the_scores(name: str) -> None:
    module = Weighed(lambda s: over_its_sum(NUMERATORS[name](s)))
    assert outcome(module, inputs(dead=3)).startswith("fused")


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_of_a_parameter(name: str) -> None:
    parameter = torch.randn(N, N, generator=torch.Generator().manual_seed(7)) * MASK
    module = Weighed(lambda s, p: over_its_sum(s.exp() * FACTORS[name](p)), parameter + 0.5 * torch.eye(N))
    assert outcome(module).startswith("fused")


def test_a_logarithm_of_the_model_has_torchs_slope() -> None:
    """0 * infinity, where the logarithm is one of the scores."""
    module, tensors = Weighed(lambda s: s.square().log().softmax(-1)), inputs(dead=3)
    rewritten = kvt_compile.rewrite(module, *tensors, topk=1.0, force_rewrite=True)
    assert [site.score for site in rewritten.report.sites] == ["log(s**2)"]
    for one in (module, rewritten.module):
        (gradient,) = torch.autograd.grad(one(*tensors).sum(), tensors[:1])
        assert gradient.isnan().all()
