"""A softmax that is accumulated over blocks of keys, as FlashAttention does: named, and no block of it is thinned."""

from __future__ import annotations

import pytest
import torch
from fuzz_check import traced
from readings import module_of
from torch import Tensor

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes

N = 9


def online(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s1, s2 = q @ k[:, :, :5].mT, q @ k[:, :, 5:].mT
    m1 = s1.amax(-1, keepdim=True)
    p1 = (s1 - m1).exp()
    m = torch.maximum(m1, s2.amax(-1, keepdim=True))
    p2, scale = (s2 - m).exp(), (m1 - m).exp()
    total = p1.sum(-1, keepdim=True) * scale + p2.sum(-1, keepdim=True)
    return (p1 @ v[:, :, :5] * scale + p2 @ v[:, :, 5:]) / total


def in_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, total = q.new_zeros(2, 3, N, 4), q.new_zeros(2, 3, N, 1)
    top = q.new_full((2, 3, N, 1), -float("inf"))
    for part in (slice(0, 5), slice(5, N)):
        keys, values = k[:, :, part], v[:, :, part]
        s = q @ keys.mT
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        p, scale, top = (s - new).exp(), (top - new).exp(), new
        out, total = out * scale + p @ values, total * scale + p.sum(-1, keepdim=True)
    return out * total.reciprocal()


@pytest.mark.parametrize("model", [online, in_a_loop])
def test_named_and_left_alone(model: object) -> None:
    inputs = [torch.randn(2, 3, N, 4) for _ in range(3)]
    result = run_passes(traced(module_of(model), inputs), Policy(), lowering="aten")  # type: ignore[arg-type]
    assert not result.decisions
    assert [refusal.step for refusal in result.refusals] == ["weights", "weights"]
    assert all("adds those of other blocks" in refusal.reason for refusal in result.refusals)


def test_one_block_is_a_row() -> None:
    """1 + the sum of its own numerator: the rows are there as a whole, and keep the largest."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).exp()
        return (p @ v + v) / (1.0 + p.sum(-1, keepdim=True))

    inputs = [torch.randn(2, 3, N, 4) for _ in range(3)]
    result = run_passes(traced(module_of(model), inputs), Policy(), lowering="aten")
    assert [decision.site.tier for decision in result.decisions] == ["scores-kept"]
