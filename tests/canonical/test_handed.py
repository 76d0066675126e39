"""A call that returns the tensor it was given keeps that tensor's gradient without grad; a new tensor has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvt_compile

Call = Callable[[Tensor], Tensor]
ITSELF: dict[str, Call] = {
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "type_as": lambda x: x.type_as(x),
    "cpu": lambda x: x.cpu(),
    "flatten of one axis": lambda x: x.flatten(1, 1),
    "real": lambda x: x.real,
    "plus": lambda x: +x,
    "dropout of nothing": lambda x: F.dropout(x, 0.5, False),
    "dropout with 0": lambda x: F.dropout(x, 0.0, True),
    "a module of dropout": nn.Dropout(0.5).eval(),
    "broadcast with itself": lambda x: torch.broadcast_tensors(x, x)[0],
}
ANOTHER: dict[str, Call] = {
    "view": lambda x: x.view(x.shape),
    "slice": lambda x: x[:],
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous of a transpose": lambda x: x.mT.contiguous().mT,
    "to and back": lambda x: x.double().float(),
    "times one": lambda x: x * 1.0,
}
PLACES = ("q", "k", "v", "table", "weights")
TIGHT = dict(rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Attention, one part of which goes through a call without grad."""

    def __init__(self, call: Call, place: str, mode: Any = torch.no_grad) -> None:
        super().__init__()
        self.call, self.place, self.mode = call, place, mode
        self.table = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5))

    def through(self, x: Tensor, place: str) -> Tensor:
        if self.place != place:
            return x
        with self.mode():
            return self.call(x)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.through(q * 0.5, "q"), self.through(k * 2, "k"), self.through(v.sin(), "v")
        scores = q @ k.mT + self.through(self.table, "table")
        return self.through(scores.softmax(-1), "weights") @ v


def run(call: Callable[..., Tensor], parameters: nn.Module, tensors: list[Tensor]) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    parameters.zero_grad(set_to_none=True)
    out = call(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (*leaves, *parameters.parameters()))]


def check(model: Attention, compiled: bool) -> list[Tensor | None]:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 5, 4) for _ in range(3)]
    expected = run(model, model, tensors)
    options: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}
    if compiled:
        torch.compiler.reset()
        found = run(torch.compile(model, backend="kvt", options=options | {"then": "eager"}), model, tensors)
    else:
        module = kvt_compile.rewrite(model, *tensors, **options).module
        found = run(module, module, tensors)
    assert [x is None for x in found] == [x is None for x in expected]
    for x, y in zip(found, expected, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, **TIGHT)
    return expected


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ITSELF)
def test_it_is_handed_on(name: str, place: str) -> None:
    assert all(x is not None for x in check(Attention(ITSELF[name], place), compiled=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ANOTHER)
def test_another_tensor_has_no_gradient(name: str, place: str) -> None:
    assert None in check(Attention(ANOTHER[name], place), compiled=True)


@pytest.mark.parametrize("name", ["contiguous", "dropout of nothing", "view"])
@pytest.mark.parametrize("place", PLACES)
def test_of_other_captures(name: str, place: str) -> None:
    check(Attention((ITSELF | ANOTHER)[name], place), compiled=False)


@pytest.mark.parametrize("place", ["q", "v", "table"])
def test_in_inference_mode(place: str) -> None:
    check(Attention(ITSELF["contiguous"], place, torch.inference_mode), compiled=True)
