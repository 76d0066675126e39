"""What is written over a tensor that has a gradient: its numbers are gone, and its gradient is there, zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

N, D = 5, 4


def whole_slice(t: Tensor, other: Tensor) -> Tensor:
    t[:] = 0.0
    return t


def ellipsis(t: Tensor, other: Tensor) -> Tensor:
    t[...] = other
    return t


def first_column(t: Tensor, other: Tensor) -> Tensor:
    t[..., 0] = 0.0
    return t


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero_": lambda t, other: t.zero_(),
    "fill_": lambda t, other: t.fill_(0.5),
    "copy_": lambda t, other: t.copy_(other),
    "a whole slice": whole_slice,
    "an ellipsis": ellipsis,
    "a part": first_column,
    "mul_": lambda t, other: t.mul_(0),
    "masked_fill_": lambda t, other: t.masked_fill_(other > -1e9, 0.0),
}


class Attention(nn.Module):
    """Adds to its scores what is left of other scores, which have a parameter in them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.scale, self.table = nn.Parameter(torch.ones(())), nn.Parameter(torch.linspace(-1, 1, N * N).view(N, N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = (q * self.scale) @ k.mT * 0.5
        t = WRITES[self.name](t, self.table.expand_as(t))
        return (q @ k.mT + t).softmax(-1) @ v


@pytest.mark.parametrize("name", WRITES)
def test_the_same_gradients_are_there(name: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, N, D) for _ in range(3)]
    model = Attention(name)
    module = kvt_compile.rewrite(model, *tensors, topk=1.0, force_rewrite=True).module
    found = []
    for each in (model, module):
        model.zero_grad(set_to_none=True)
        each(*tensors).square().sum().backward()
        found.append([p.grad for p in (model.scale, model.table)])
    for expected, got in zip(*found, strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
