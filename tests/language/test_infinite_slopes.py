"""Slopes that are infinite where a key has no weight, in every lowering: NaN where the model has NaN, and nothing where
a selection dropped the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from interpreted import NAME, triton_on_cpu
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops

KEYS = 11
LOWERINGS = ("aten", "c", "resident", "streaming")
ROOT = "sqrt(abs(s))"


@pytest.fixture(params=LOWERINGS)
def lowering(request: pytest.FixtureRequest) -> Iterator[str]:
    on_gpu = request.param in ("resident", "streaming")
    with triton_on_cpu(request.param) if on_gpu else nullcontext():
        yield NAME if on_gpu else request.param


def tensors(keys: int = KEYS) -> list[Tensor]:
    """Products are positive, but for key 3, whose products are 0."""
    torch.manual_seed(1)
    q, k, v = torch.rand(2, 2, 5, 8), torch.rand(2, 2, keys, 8), torch.randn(2, 2, keys, 4)
    k[:, :, 3] = 0.0
    return [q, k, v]


def gradients(score: str, weight: str, topk: int, captured: list[Tensor], lowering: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (*tensors(), *captured)]
    out = torch.ops.kvt.attention(*leaves[:3], leaves[3:], score, weight, topk, [], 0.0, None, lowering)[0]
    return list(torch.autograd.grad(out.sin().sum(), leaves))


def test_a_key_without_weight_at_k_n(lowering: str) -> None:
    prior = torch.rand(KEYS)
    prior[3] = 0.0
    found = gradients("s + log(c0[j])", "p", KEYS, [prior], lowering)
    leaves = [x.clone().requires_grad_() for x in (*tensors(), prior)]
    q, k, v, c = leaves
    out = (q @ k.mT + c.log()).softmax(-1) @ v
    expected = torch.autograd.grad(out.sin().sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-6)
    assert found[3].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("weight", ["p", "sqrt(p)"])
def test_a_dropped_key(weight: str, lowering: str) -> None:
    """The same gradients as without the key, and zeros for it."""
    found = gradients(ROOT, weight, 4, [], lowering)
    others = [n for n in range(KEYS) if n != 3]
    leaves = [x.double().requires_grad_() for x in tensors()]
    q, k, v = leaves
    t = (q @ k[:, :, others].mT).abs().sqrt()
    best = t.topk(4)
    w = best.values.softmax(-1)
    w = w.sqrt() if weight != "p" else w
    out = (w.unsqueeze(-1) * v[:, :, others].unsqueeze(2).expand(-1, -1, 5, -1, -1).gather(
        3, best.indices.unsqueeze(-1).expand(-1, -1, -1, -1, 4))).sum(3)  # fmt: skip
    expected = torch.autograd.grad(out.sin().sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    assert not found[1][:, :, 3].any()


def test_queries_and_keys_past_the_last_one(lowering: str) -> None:
    """What a tile holds beyond the tensors has products of 0."""
    leaves = [x[:, :, [n for n in range(x.shape[2]) if n != 3]].clone().requires_grad_() for x in tensors()]
    q, k, v = leaves
    out = torch.ops.kvt.attention(q, k, v, [], ROOT, "p", KEYS, [], 0.0, None, lowering)[0]
    found = torch.autograd.grad(out.sin().sum(), leaves)
    expected = torch.autograd.grad(((q @ k.mT).abs().sqrt().softmax(-1) @ v).sin().sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
