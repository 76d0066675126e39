"""`batch_dim`: attention over what the user calls the batch is left dense, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvt_compile
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.topk import parse_batch_dim
from kvt_compile.observe import observe

B, N, C = 6, 5, 8
REASON = "it attends over the batch (axis 0 of input x, by batch_dim)"


class Group(nn.Module):
    """Attention over axis 0, or over axis 1, of an input that only linear layers have touched."""

    def __init__(self, over: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).transpose(0, 1) if self.over == 0 else f(x) for f in (self.q, self.k, self.v))
        out = (0.25 * q @ k.mT).softmax(-1) @ v
        return out.transpose(0, 1) if self.over == 0 else out


def outcomes(model: nn.Module, *inputs: Tensor, **options: Any) -> list[tuple[str, str, str]]:
    return [(site.outcome, site.axis, site.reason) for site in kvt_compile.explain(model, *inputs, **options).sites]


X = torch.randn(B, N, C)


@pytest.mark.parametrize(
    ("over", "batch_dim", "expected"),
    [
        (0, None, ("fused", "token", "")),  # undecidable: as before
        (0, 0, ("dense", "batch", REASON)),
        (0, {"x": 0}, ("dense", "batch", REASON)),
        (0, {"x": 1}, ("fused", "token", "")),
        (0, {"x": None}, ("fused", "token", "")),
        (0, 1, ("fused", "token", "")),
        (1, 0, ("fused", "token", "")),
        (1, 1, ("dense", "batch", REASON.replace("0", "1"))),
    ],
)
def test_explain(over: int, batch_dim: Any, expected: tuple[str, str, str]) -> None:
    assert outcomes(Group(over), X, batch_dim=batch_dim) == [expected]


def test_the_batch_can_be_rewritten_all_the_same() -> None:
    assert outcomes(Group(), X, batch_dim=0, batch_attention="rewrite") == [("fused", "batch", "")]


def test_every_way_in() -> None:
    model = Group()
    expected = model(X)
    result = kvt_compile.rewrite(model, X, batch_dim=0, topk=2)
    assert [site.reason for site in result.report.sites] == [REASON]
    program = kvt_compile.rewrite(torch.export.export(model, (X,)), batch_dim=0, topk=2)
    assert [site.reason for site in program.report.sites] == [REASON]
    compiled = torch.compile(model, backend="kvt", options={"topk": 2, "batch_dim": 0, "then": "eager"})
    for same in (result.module, program.module, compiled):
        assert torch.equal(same(X), expected)
    torch._dynamo.reset()
    other = torch.compile(model, backend="kvt", options={"topk": 2, "batch_dim": {"x": 1}, "then": "eager"})
    assert not torch.allclose(other(X), expected)
    calls: list[Any] = []
    observe(model, (X,), calls.append, batch_dim=0)
    assert calls == []
    with pytest.raises(kvt_compile.CalibrationError, match="by batch_dim"):
        kvt_compile.calibrate(model, torch.randn(16, N, C), ratio=0.5, batch_dim=0)


def test_multihead_attention_that_is_given_a_batch_first() -> None:
    wrong, right = nn.MultiheadAttention(C, 2), nn.MultiheadAttention(C, 2, batch_first=True)
    assert outcomes(wrong, X, X, X, batch_dim=0)[0][:2] == ("dense", "batch")
    assert outcomes(right, X, X, X, batch_dim=0)[0][:2] == ("scores-kept", "token")
    assert outcomes(wrong, X, X, X)[0][:2] == ("scores-kept", "token")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        keys = self.k(memory)
        return (self.q(x) @ keys.mT).softmax(-1) @ keys


def test_each_input_has_its_own_batch() -> None:
    memory = torch.randn(9, C)  # no batch: axis 0 is tokens
    assert outcomes(Two(), X, memory, batch_dim={"x": 0}) == [("fused", "token", "")]
    assert outcomes(Two(), X, memory, batch_dim=0)[0][0] == "dense"
    assert outcomes(Two(), X, memory, batch_dim={"x": 1, "memory": 0})[0][0] == "dense"


class Merged(Group):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(1, -1, C))


def test_axes_that_were_made_one() -> None:
    ((outcome, axis, reason),) = outcomes(Merged(over=1), X, batch_dim=0)
    assert (outcome, axis) == ("dense", "batch")
    assert reason == (
        "it attends over the batch among others (axes 0 and 1 of x together, of which axis 0 is the batch by batch_dim)"
    )
    assert outcomes(Merged(over=1), X, batch_dim=2) == [("fused", "token", "")]


def test_an_axis_that_is_marked_dynamic_says_nothing() -> None:
    program = torch.export.export(Group(), (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    sites = kvt_compile.explain(program).sites
    assert [(site.outcome, site.axis, site.keys_from) for site in sites] == [("fused", "token", "axis 0 of x")]


@pytest.mark.parametrize(
    ("batch_dim", "message"),
    [
        (-1, "batch_dim is -1, expected an axis"),
        (True, "batch_dim is True, expected an axis"),
        ("0", "batch_dim is '0', expected an axis"),
        ({"x": 0.5}, "batch_dim is 0.5, expected an axis"),
        ({0: 0}, "0 is no name of an input"),
        (3, "no input of the model has that axis; its inputs are: x with 3 axes"),
        ({"y": 0}, "reads no input 'y' with an axis 0; its inputs are: x with 3 axes"),
        ({"x": 3}, "reads no input 'x' with an axis 3"),
    ],
)
def test_what_cannot_be_meant(batch_dim: Any, message: str) -> None:
    for call in (kvt_compile.explain, kvt_compile.rewrite):
        with pytest.raises((kvt_compile.OptionError, TypeError), match=message):
            call(Group(), X, batch_dim=batch_dim)


def test_command_line() -> None:
    assert parse_batch_dim(None) is None
    assert parse_batch_dim(["1"]) == 1
    assert parse_batch_dim(["x=0", "maps['low']=1"]) == {"x": 0, "maps['low']": 1}
    for wrong in (["a"], ["x="], ["-1"], ["0", "1"], ["0", "x=1"]):
        with pytest.raises(UserError, match="--batch-dim"):
            parse_batch_dim(wrong)
