"""The reference against definitions even simpler than itself: a row at a time, in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import Case, reference
from torch import Tensor

from kvt_compile.kernels.plain.reference import reference_attention, reference_softmax

INF, NAN = math.inf, math.nan

# row of scores, k, kept
ROWS = {
    "distinct": ([1.0, 4.0, 2.0, 3.0], 2, [0, 1, 0, 1]),
    "k is all": ([1.0, 4.0, 2.0, 3.0], 4, [1, 1, 1, 1]),
    "k beyond all": ([1.0, 4.0], 9, [1, 1]),
    "k = 1": ([1.0, 4.0, 2.0], 1, [0, 1, 0]),
    "tie at the threshold": ([1.0, 3.0, 2.0, 2.0, 2.0], 2, [0, 1, 1, 1, 1]),
    "tie above the threshold": ([3.0, 3.0, 2.0, 1.0], 3, [1, 1, 1, 0]),
    "constant row": ([5.0, 5.0, 5.0], 1, [1, 1, 1]),
    "two values": ([0.0, 1.0, 0.0, 1.0], 1, [0, 1, 0, 1]),
    "two values, low one reached": ([0.0, 1.0, 0.0, 1.0], 3, [1, 1, 1, 1]),
    "masked": ([1.0, -INF, 3.0, 2.0], 2, [0, 0, 1, 1]),
    "fewer valid than k": ([1.0, -INF, -INF, 2.0], 3, [1, 0, 0, 1]),
    "fully masked": ([-INF, -INF], 1, [0, 0]),
    "zeros of both signs tie": ([-0.0, 0.0, -1.0], 1, [1, 1, 0]),
    "denormals": ([5e-324, 1e-323, 0.0], 1, [0, 1, 0]),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    row, k, expected = ROWS[name]
    weights, logsumexp, threshold, kept = reference_softmax(torch.tensor(row, dtype=torch.float64), k)
    assert kept.tolist() == [bool(x) for x in expected]
    total = sum(math.exp(t) for t, keep in zip(row, expected, strict=True) if keep)
    by_hand = [math.exp(t) / total if keep else 0.0 for t, keep in zip(row, expected, strict=True)]
    assert weights.tolist() == pytest.approx(by_hand)
    assert logsumexp.item() == pytest.approx(math.log(total) if total else -INF)
    dropped = [t for t, keep in zip(row, expected, strict=True) if not keep and t > -INF]
    if dropped:
        assert max(dropped) < threshold.item() <= min(t for t, keep in zip(row, expected, strict=True) if keep)
    else:
        assert threshold.item() == -INF


@pytest.mark.parametrize("row", [[1.0, NAN, 0.0], [NAN, NAN], [1.0, INF, 0.0], [-INF, INF], [-INF, NAN]], ids=str)
@pytest.mark.parametrize("k", [1, 5])
def test_a_broken_row_is_nan_as_in_dense_softmax(row: list[float], k: int) -> None:
    t = torch.tensor(row, dtype=torch.float64)
    assert t.softmax(-1).isnan().all()
    weights, logsumexp, threshold, kept = reference_softmax(t, k)
    assert weights.isnan().all()
    assert logsumexp.isnan()
    assert threshold.isnan()
    assert kept.all()


DENSE = [
    Case("plain", topk=99),
    Case("cross", topk=99, queries=5, keys=11, value_dim=3),
    Case("gqa", topk=99, heads=6, kv_heads=2),
    Case("one key", topk=99, keys=1),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_k_beyond_all_is_dense(case: Case) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in case.tensors()[:3])
    out = reference(case, (q, k, v)).out
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, dense)
    grad = torch.randn_like(dense)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(dense, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def by_loops(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, topk: int) -> Tensor:
    """The definition, one number at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                row = [0.5 * float(q[b, h, i] @ k[b, h // group, j]) + float(bias[h, i, j]) for j in range(k.shape[2])]
                tau = sorted(row, reverse=True)[topk - 1]
                weights = [math.exp(t) if t >= tau else 0.0 for t in row]
                for j, w in enumerate(weights):
                    out[b, h, i] += w / sum(weights) * v[b, h // group, j]
    return out


def test_is_the_definition() -> None:
    case = Case("loops", heads=4, kv_heads=2, queries=3, keys=7, topk=3)
    q, k, v = (x.detach().double() for x in case.tensors()[:3])
    bias = torch.randn(4, 3, 7, dtype=torch.float64)
    result = reference_attention(q, k, v, [bias], topk=3, score="0.5*s + c0[h, i, j]")
    torch.testing.assert_close(result.out, by_loops(q, k, v, bias, 3))
    assert result.kept.sum(-1).eq(3).all()


def test_is_differentiable_by_autograd() -> None:
    case = Case("gradcheck", queries=3, keys=5, topk=2, head_dim=3, value_dim=2)
    q, k, v = (x.detach().double().requires_grad_() for x in case.tensors()[:3])
    bias = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(*x: Tensor) -> Tensor:
        return reference_attention(*x[:3], x[3:], topk=2, score="tanh(s) + c0[h, i, j]", weight="p*c0[h, 0, 0]").out

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_a_fully_masked_row_is_zero_and_gives_no_gradient() -> None:
    case = Case("masked", queries=3, keys=5, topk=2)
    q, k, v = (x.detach().double().requires_grad_() for x in case.tensors()[:3])
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1] = False
    out = reference_attention(q, k, v, [keep], topk=2, score="where(c0[i, j], s, -oo)").out
    assert (out[:, :, 1] == 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, 1] == 0).all()


def test_a_masked_key_gives_a_factor_s_neighbours_no_gradient_of_nan() -> None:
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    score = "0.5*where(lt(j, 1), c0[i, j] + 1, c0[i, j] + where(lt(j, 2), -oo, s))"
    out = reference_attention(q, k, v, [bias], score=score, topk=2).out
    (gradient,) = torch.autograd.grad(out.square().sum(), (bias,))
    assert gradient.isfinite().all()
    assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("lowering", ["reference", "c"])
def test_keys_with_the_same_features_tie_wherever_they_stand(lowering: str) -> None:
    """Padded windows have many of them; 67 keys reach every border of a blocked product."""
    torch.manual_seed(0)
    q, v = torch.randn(2, 3, 9, 24, dtype=torch.float64), torch.eye(67, dtype=torch.float64).expand(2, 3, 67, 67)
    k = torch.randn(2, 3, 5, 24, dtype=torch.float64)[:, :, torch.arange(67) % 5]
    out = torch.ops.kvt.attention(q, k, v, [], "0.2*s", "p", 20, [], 0.0, None, lowering)[0]
    kept = out > 0
    for first in range(5):
        copies = kept[..., first::5]
        assert (copies.all(-1) == copies.any(-1)).all()
    assert kept.sum(-1).min() >= 20
