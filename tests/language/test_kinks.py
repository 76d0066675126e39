"""Where a function has no derivative, a model gets the one torch gives it: each kink met exactly, in each lowering."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvt_compile import verify
from kvt_compile.torch_versions import numbers

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Scores of whole numbers from -2 to 2, so that they meet the bounds `low` and `high` [6] exactly."""

    def __init__(self, score: Score, low: float, high: float) -> None:
        super().__init__()
        self.score = score
        self.low, self.high = (nn.Parameter(torch.full((6,), x)) for x in (low, high))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.score(q @ k.mT, self.low, self.high).softmax(-1) @ v


KINKS: dict[str, tuple[Score, float, float]] = {
    "clamp_by_tensors": (torch.clamp, -1.0, 1.0),
    "clamp_where_the_bounds_meet": (torch.clamp, 1.0, 1.0),
    "clamp_where_the_bounds_cross": (torch.clamp, 1.0, -1.0),
    "clamp_from_below": (lambda s, low, high: torch.clamp(s, min=low), -1.0, 0.0),
    "clamp_from_above": (lambda s, low, high: torch.clamp(s, max=high), 0.0, 1.0),
    "clamp_by_a_tensor_and_a_copy": (lambda s, low, high: s.clamp(low, low * 1.0), 0.0, 0.0),
    "clamp_by_numbers": (lambda s, low, high: s.clamp(-1, 1) * high, 0.0, 2.0),
    "clamp_of_the_captured": (lambda s, low, high: s + low.clamp(-1.0, 1.0) * high.clamp(min=1.0), -1.0, 1.0),
    "maximum": (lambda s, low, high: torch.maximum(s, low), 1.0, 0.0),
    "minimum": (lambda s, low, high: torch.minimum(high, s), 0.0, -1.0),
    "maximum_of_the_captured": (lambda s, low, high: s * torch.maximum(low, high), 1.0, 1.0),
    "square_root_of_relu": (lambda s, low, high: F.relu(s).sqrt() + low, 0.0, 0.0),
    "relu6": (lambda s, low, high: F.relu6(s + 4 * low), 1.0, 0.0),
    "hardtanh": (lambda s, low, high: F.hardtanh(s * high), 0.0, 1.0),
    "relu": (lambda s, low, high: F.relu(s + low), 0.0, 0.0),
    "leaky_relu": (lambda s, low, high: F.leaky_relu(s - low, 0.25), 1.0, 0.0),
    "absolute": (lambda s, low, high: (s - low).abs(), 1.0, 0.0),
    "square_root_of_what_is_captured": (lambda s, low, high: s * (low + 0.0).sqrt(), 4.0, 0.0),
    "power_of_zero": (lambda s, low, high: (s - low) ** 2, 1.0, 0.0),
    "where_equal": (lambda s, low, high: torch.where(s == low, s * high, s), 1.0, 3.0),
    "where_not_above": (lambda s, low, high: torch.where(s > low, s, low), 1.0, 0.0),
}


def inputs() -> list[Tensor]:
    """Products of q and k are whole numbers."""
    steps = torch.arange(6.0)
    q = torch.stack([steps % 2, torch.ones(6)], -1)
    k = torch.stack([(steps + 1) % 3, steps % 3 - 2], -1)
    return [q.expand(2, 6, 2), k.expand(2, 6, 2), torch.randn(2, 6, 3)]


@pytest.mark.parametrize("lowering", ["aten", "c"])
@pytest.mark.parametrize("case", KINKS)
def test_gradients_at_a_kink_are_torch_s(case: str, lowering: str) -> None:
    found = verify(Model(*KINKS[case]), *inputs(), lowering=lowering, one_by_one=False, reproduce_in=False)
    assert found.ok, found
    if found.together is None:  # from torch 2.14 on a tie with a tensor as bound is split, and such a clamp is not read
        assert "clamp" in case
        assert numbers(torch.__version__) >= (2, 14)


@pytest.mark.parametrize("lowering", ["aten", "c"])
def test_square_root_at_zero(lowering: str) -> None:
    """Its slope is infinite, and a weight of zero times that is NaN: as torch has it, and in the same places."""
    model = Model(lambda s, low, high: (s + 2 * low).sqrt() + s * high, 1.0, 0.5)
    found = verify(model, *inputs(), lowering=lowering, one_by_one=False, reproduce_in=False)
    assert found.together is not None, found.left
    assert found.ok, found
