"""A model that was looked at is as it was."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

import kvt_compile
from kvt_compile.capture.unchanged import unchanged


class Grows(nn.Module):
    """Makes a table for the number of tokens at hand, as ConViT does, where the one it has is of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1] ** 2, dtype=x.dtype).view(x.shape[1], -1) / 50
        return (x @ x.mT + self.table).softmax(-1) @ x


def test_buffers_that_are_replaced_and_written_to() -> None:
    model, x = Grows(), torch.randn(2, 5, 4)
    table = model.table
    with unchanged(model):
        expected = model(x)
    assert model.table is table
    assert model.calls == 0
    assert torch.equal(model(x), expected)


def test_looking_leaves_a_model_that_computes_the_same() -> None:
    model, x = Grows(), torch.randn(2, 5, 4)
    expected = Grows()(x)
    kvt_compile.explain(model, x)
    assert torch.equal(model(x), expected)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def test_a_module_that_is_compiled_by_torchscript() -> None:
    with warnings.catch_warnings(action="ignore"):
        inner = torch.jit.script(Doubled())
    model, x = nn.Sequential(inner, nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    with unchanged(model):
        inner.by.fill_(3.0)
    assert torch.equal(model(x), expected)


def test_a_buffer_nobody_can_write_to() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.zeros(1, 3).expand(2, 3))
    with unchanged(model):
        pass
    assert model.table.shape == (2, 3)
