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


def written_rows(s: Tensor, t: Tensor, p: Tensor) -> Tensor:
    s[:, :1] = p
    return s[:, 1:2]


PARTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "beside a row that was written": (written_rows, "scores-kept"),
    "rows of a concatenation": (lambda s, t, p: torch.cat([p.expand(2, 1, N), s], 1)[:, 1:], "scores-kept"),
    "one of a stack": (lambda s, t, p: torch.stack([s, t * p])[0], "scores-kept"),
    "rows of what is read anyway": (lambda s, t, p: torch.cat([t, s * p[..., :1]], 1)[:, N:], "fused"),
    "rows of numbers": (lambda s, t, p: torch.cat([torch.zeros(2, 1, N), s * p[..., :1]], 1)[:, 1:], "fused"),
}


class Part(nn.Module):
    """Reads a part of scores, of which another part may have a parameter in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.p = name, nn.Parameter(torch.ones(1, 1, N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PARTS[self.name][0]((q @ k.mT) * 0.5, q @ k.mT, self.p).softmax(-1) @ v


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_read_has_gradients_of_zeros(name: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, N, D) for _ in range(3)]
    model = Part(name)
    rewritten = kvt_compile.rewrite(model, *tensors, topk=1.0, force_rewrite=True)
    assert [site.outcome for site in rewritten.report.sites] == [PARTS[name][1]]
    found = []
    for each in (model, rewritten.module):
        model.zero_grad(set_to_none=True)
        each(*tensors).square().sum().backward()
        found.append(model.p.grad)
    expected, got = found
    assert expected is not None
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
