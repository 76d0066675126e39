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
from kvt_compile.kernels.op.lowerings import LoweringError

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


def test_triton_refuses_a_weight_that_is_not_0_where_p_is() -> None:
    """Its kernels skip keys without weight."""
    for weight in ("p + c0[j]", "exp(p)", "1.0 - p", "where(c0[j], p, 1.0)", "p/p"):
        with pytest.raises(LoweringError, match="not 0 where p is"), triton_on_cpu("resident"):
            gradients("s", weight, 4, [torch.rand(KEYS)], NAME)


@pytest.mark.parametrize("weight", ["p + c0[j]*c0[j]", "p*c0[j] + exp(c0[j])", "p*c0[j]**2", "p + 2.0*c0[j]"])
def test_what_a_weight_captures_has_gradients_of_dropped_keys(weight: str, lowering: str) -> None:
    """A weight need not be 0 where p is."""
    if lowering == NAME and "*c0[j]**2" not in weight:
        pytest.skip("refused")
    found = gradients("s", weight, 4, [torch.rand(KEYS, generator=torch.Generator().manual_seed(3))], lowering)
    expected = gradients("s", weight, 4, [torch.rand(KEYS, generator=torch.Generator().manual_seed(3))], "reference")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert (expected[3][3] != 0) == ("*c0[j]**2" not in weight)


@pytest.mark.parametrize("score", ["relu(s)", "where(c0[j], s, -oo)"])
def test_dropped_keys_of_a_row_of_nan(score: str, lowering: str) -> None:
    leaves = [x.clone().requires_grad_() for x in tensors()]
    bad = leaves[2].detach().clone()
    bad[:, :, 5] = torch.nan
    leaves[2] = bad
    mask = [torch.ones(KEYS, dtype=torch.bool)] if "c0" in score else []
    q = leaves[0].detach()[:, :, :1].requires_grad_()
    found, expected = (
        torch.autograd.grad(
            torch.ops.kvt.attention(q, *leaves[1:], mask, score, "p", 4, [], 0.0, None, x)[0].sum(), leaves[1]
        )[0].isnan()
        for x in (lowering, "reference")
    )
    assert torch.equal(found, expected)
    assert not expected.all()


def test_a_quotient_is_no_product_with_a_reciprocal(lowering: str) -> None:
    """1 / 1e-39 is infinite in float32, and the gradient of its logarithm is not."""
    small = torch.full((KEYS,), 0.5)
    small[3] = 1e-39
    found = gradients("s + log(c0[j])", "p", KEYS, [small], lowering)[3]
    expected = gradients("s + log(c0[j])", "p", KEYS, [small.double()], "reference")[3]
    if lowering == "c":  # a weight below 1e-38 is 0 there, and so is what comes through it
        assert found[3] == 0
        found[3] = expected[3]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
