"""The row kernel of kvt::topk_softmax, and through it the selection, on every kind of row that is hard to select."""

from __future__ import annotations

import math

import pytest
import torch
from hard_rows import ROWS, assert_kept
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.kernels.plain.reference import reference_softmax

INF, NAN = math.inf, math.nan


def weights(scores: Tensor, topk: int, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.ops.kvt.topk_softmax(scores, dim % scores.dim(), topk, dtype or scores.dtype, "c")


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row(kind: str) -> None:
    torch.manual_seed(0)
    for n in (2, 33, 197, 700):
        for topk in {1, 2, n // 8 + 1, n // 2, n - 1, n}:
            assert_kept(weights, ROWS[kind](40, n), topk)


@settings(max_examples=150)
@given(
    rows=st.lists(
        st.lists(
            st.one_of(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.sampled_from([0.0, -0.0, 1.0, -INF, 1.401298464324817e-45]),
                st.integers(-3, 3).map(float),
            ),
            min_size=7,
            max_size=7,
        ),
        min_size=1,
        max_size=40,
    ),
    topk=st.integers(1, 7),
)
def test_any_rows(rows: list[list[float]], topk: int) -> None:
    assert_kept(weights, torch.tensor(rows), topk)


def test_nan_and_positive_infinity_make_a_row_nan_and_no_other() -> None:
    scores = torch.randn(3, 5)
    scores[0, 1], scores[2, 4] = NAN, INF
    result = weights(scores, 2)
    assert result[0].isnan().all()
    assert result[2].isnan().all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [-1, 1])
def test_dtypes_and_dimensions(dtype: torch.dtype, dim: int) -> None:
    scores = torch.randn(3, 19, 11).to(dtype).requires_grad_()
    result = weights(scores, 5, dim)
    moved = scores.detach().double().movedim(dim, -1).requires_grad_()
    exact = reference_softmax(moved, 5)[0]
    plain = reference_softmax(moved.detach().to(torch.float32), 5)[0].to(dtype)
    unit = 2.0**-29 if dtype == torch.float64 else 1.0
    assert_close("weights", result.detach().movedim(dim, -1), exact.detach(), plain, unit)
    grad = torch.randn_like(scores)
    (mine,) = torch.autograd.grad(result, scores, grad)
    w = result.detach().double()
    expected = w * (grad.double() - (w * grad.double()).sum(dim, keepdim=True))
    budget = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(mine.double(), expected, rtol=0, atol=budget)
