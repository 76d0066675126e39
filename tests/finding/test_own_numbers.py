"""What a model makes of its mask are numbers as torch computes them; what is not selected gets nothing only where the
scores are of usual size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from own_kept import INF, K, Weights, keep, least, of_scores, own_ks, top
from torch import Tensor, nn

Kept = Callable[[Callable[..., Tensor]], Tensor]


def by(kept: Kept, fill: float = -INF) -> Weights:
    """`kept` of a mask that is made with a number, of a dtype: mask(1, torch.uint8)."""

    def weights(s: Tensor) -> Tensor:
        def mask(number: float = 1, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros_like(s, dtype=dtype).scatter(-1, s.topk(K, -1).indices, number)

        return keep(s, kept(mask), fill).softmax(-1)

    return weights


NO_SUCH_NUMBER: dict[str, Weights] = {
    "uint8 has no -1": by(lambda mask: ~((mask(1, torch.uint8) - 1) < 0)),
    "nor has it 256": by(lambda mask: mask(255, torch.uint8) + 1 > 0, -1e9),
    "True and True is True": by(lambda mask: (m := mask(True, torch.bool)) + m > 1, -1e9),
    "and 1": by(lambda mask: (m := mask(True, torch.bool)) + m > 1.5, -1e9),
    "half of 1 is 0": by(lambda mask: mask(0.5, torch.long) > 0, -1e9),
    "a thousand millions and 1": by(lambda mask: mask() + 1e9 > 1e9, -1e9),
    "too small for float32": by(lambda mask: mask(1e-60) > 0, -1e9),
    "too small for float16": by(lambda mask: mask().half() * 1e-9 > 0, -1e9),
    "0 times what is infinite in float32": (
        lambda s: (s + (1 - torch.zeros_like(s).scatter(-1, s.topk(K).indices, 1.0)) * -1e39).softmax(-1)
    ),
    "NaN where it is not selected": lambda s: torch.where(top(s), s, torch.nan).softmax(-1),
    "NaN that is filled in": lambda s: keep(s, s >= least(s), torch.nan).softmax(-1),
    "NaN of a logarithm": lambda s: (s + (torch.where(top(s), 1.0, -1.0)).log()).softmax(-1),
}
SUCH_A_NUMBER: dict[str, Weights] = {
    "of uint8": by(lambda mask: 1 - mask(1, torch.uint8) < 1),
    "minus 1, which is 255": by(lambda mask: -mask(1, torch.uint8) > 200),
    "of int": by(lambda mask: mask(3, torch.int) * 2 - 5 == 1),
    "0.1 and 0.2 in float32": by(lambda mask: mask(0.1) + 0.2 == torch.tensor(0.3)),
    "a cast": by(lambda mask: mask(2.0).bool().float() >= 1),
    "1 - mask": lambda s: (s + (1 - torch.zeros_like(s).scatter(-1, s.topk(K).indices, 1.0)) * -1e9).softmax(-1),
    "a logarithm": lambda s: (s + torch.where(top(s), 1.0, 0.0).log()).softmax(-1),
}


@pytest.mark.parametrize("name", NO_SUCH_NUMBER)
def test_what_a_dtype_does_not_hold(name: str) -> None:
    assert own_ks(of_scores(NO_SUCH_NUMBER[name])) == []


@pytest.mark.parametrize("name", SUCH_A_NUMBER)
def test_what_it_holds(name: str) -> None:
    assert own_ks(of_scores(SUCH_A_NUMBER[name])) == ["4"]


# ---- a finite number for the others ----------------------------------------------------------------------------------


def filled(scores: Weights, fill: float = -1e4) -> Weights:
    return lambda s: keep(t := scores(s), t >= least(t), fill).softmax(-1)


OF_ANY_SIZE: dict[str, Weights] = {
    "far below": filled(lambda s: s - 99999.0),
    "twice": filled(lambda s: s - 5000.0 - 5000.0),
    "as far as -1e9": filled(lambda s: s - 6e8, -1e9),
    "times": filled(lambda s: (s - 30) * 9999.0),
    "a tensor": filled(lambda s: s - torch.full((16,), 1e5)),
    "an exponential": filled(lambda s: s - torch.full((16,), 12.0).exp()),
    "the largest": filled(lambda s: s - s.amax(-1, keepdim=True) * 1e6),
    "the sum": filled(lambda s: s - s.logsumexp(-1, keepdim=True) * 5e3),
    "a logarithm of weights": filled(lambda s: (s * 1e4).log_softmax(-1) - 99999.0),
    "squares": filled(lambda s: -((s * 100) ** 2)),
    "added": lambda s: ((s - 9000.0) * 5 + (1 - top(s).float()) * -1e4).softmax(-1),
}
OF_USUAL_SIZE: dict[str, Weights] = {
    "as they are": filled(lambda s: s),
    "scaled": filled(lambda s: s * 0.125 - 5),
    "without the largest": filled(lambda s: s - s.amax(-1, keepdim=True)),
    "far, and farther": filled(lambda s: s * 10 - 499.0, -1e9),
    "bounded": filled(lambda s: 50 * (s / 50).tanh()),
}


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_a_number_among_scores_of_any_size(name: str) -> None:
    assert own_ks(of_scores(OF_ANY_SIZE[name])) == []


@pytest.mark.parametrize("name", OF_USUAL_SIZE)
def test_a_number_far_below_scores(name: str) -> None:
    assert own_ks(of_scores(OF_USUAL_SIZE[name])) == ["4"]


class Biased(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], buffer: bool) -> None:
        super().__init__()
        self.change = change
        bias = torch.linspace(-1, 1, 16)
        if buffer:
            self.register_buffer("bias", bias)
        else:
            self.bias = nn.Parameter(bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return filled(lambda s: self.change(s, self.bias))(q @ k.mT) @ v


def test_a_bias() -> None:
    """A parameter is of usual size, as it is; a buffer may be a mask."""
    assert own_ks(Biased(lambda s, b: s + b, buffer=False)) == ["4"]
    assert own_ks(Biased(lambda s, b: s * 10 * b.exp(), buffer=True)) == []
    assert own_ks(Biased(lambda s, b: s + b * 1e6, buffer=False)) == []
    assert own_ks(Biased(lambda s, b: s + b, buffer=True)) == []


def test_operands_that_are_scaled() -> None:
    assert own_ks(lambda q, k, v: filled(lambda s: s)((q.abs() * -1e4) @ k.abs().mT) @ v) == []
    assert own_ks(lambda q, k, v: filled(lambda s: s)((q * 0.5) @ (k / 2).mT) @ v) == ["4"]
