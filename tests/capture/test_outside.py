"""`explain` names attention that no captured graph has, and nothing else besides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvt_compile
from kvt_compile.report.report import Report

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(8, 24), attend

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(*self.qkv(x).chunk(3, -1))


def explained(*attends: Attend) -> Report:
    torch._dynamo.reset()
    return kvt_compile.explain(nn.Sequential(*map(Block, attends)).eval(), torch.randn(2, 6, 8))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@torch._dynamo.disable
def disabled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


@torch._dynamo.disable
def disabled_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def after_a_break(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return F.softmax(q @ k.mT, -1) @ v


def between_two_graphs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    torch._dynamo.graph_break()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "function"), [(disabled, "softmax"), (disabled_sdpa, "scaled_dot_product_attention")]
)
def test_what_runs_outside_is_named(attend: Attend, function: str) -> None:
    report = explained(plain, attend)
    assert len(report.sites) == 1
    (refusal,) = report.refusals
    assert (refusal.node, refusal.module, refusal.step) == (function, "1", "capture")
    assert "test_outside.py" in refusal.location
    assert "graph break" in refusal.reason
    assert "outside every captured graph" in str(report)


@pytest.mark.parametrize("attend", [plain, after_a_break])
def test_what_runs_in_a_graph_is_not(attend: Attend) -> None:
    report = explained(plain, attend)
    assert report.sites
    assert not report.refusals


IN_NO_FILE = """
import torch
import torch.nn.functional as F

def plain(q, k, v):
    return (q @ k.mT).softmax(-1) @ v

def masked(q, k, v):
    return torch.masked.softmax(q @ k.mT, -1, mask=torch.ones(6, 6).tril().bool()) @ v

def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)

@torch._dynamo.disable
def disabled(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v

def both(q, k, v):
    return disabled(q, k, masked(q, k, v))
"""


@pytest.fixture(params=["<string>", "<elsewhere>"])
def in_no_file(request: pytest.FixtureRequest) -> dict[str, Attend]:
    """What `python -c` runs, and `exec` with a name of its own."""
    names: dict[str, Attend] = {}
    exec(compile(IN_NO_FILE, request.param, "exec"), names)
    return names


@pytest.mark.parametrize("name", ["plain", "masked", "sdpa"])
def test_code_that_is_in_no_file(name: str, in_no_file: dict[str, Attend]) -> None:
    report = explained(plain, in_no_file[name], in_no_file[name])
    assert [site.module for site in report.sites] == ["0", "1", "2"]
    assert "traceless" not in "".join(site.location for site in report.sites)
    assert not report.refusals


@pytest.mark.parametrize("name", ["disabled", "both"])
def test_what_runs_outside_is_named_there_too(name: str, in_no_file: dict[str, Attend]) -> None:
    report = explained(plain, in_no_file[name])
    assert len(report.sites) == (2 if name == "both" else 1)
    (refusal,) = report.refusals
    assert (refusal.node, refusal.module, refusal.step) == ("softmax", "1", "capture")


def test_a_softmax_cut_off_from_its_product_is_refused_once() -> None:
    (refusal,) = explained(between_two_graphs).refusals
    assert refusal.step == "scores"
