"""The row kernels of kvt::topk_softmax in Triton's interpreter, and through them the selection, on every kind of
row that is hard to select."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from hard_rows import ROWS, assert_kept
from interpreted import NAME, Recorder, triton_on_cpu
from oracles import assert_close
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.kernels.plain.reference import reference_softmax, within_tolerance

pytest.importorskip("triton")
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["resident", "streaming"])
def kind(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with warnings.catch_warnings(), triton_on_cpu(request.param) as recorder:
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of infinities
        yield recorder


def weights(scores: Tensor, topk: int, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    return torch.ops.kvt.topk_softmax(scores, dim % max(scores.dim(), 1), topk, dtype or scores.dtype, NAME)


@pytest.mark.parametrize("rows", ROWS)
def test_every_kind_of_row(rows: str, kind: Recorder) -> None:
    torch.manual_seed(0)
    for n, topk in ((2, 1), (33, 16), (61, 7), (61, 60)) if kind.kind == "resident" else ((37, 13),):
        assert_kept(weights, ROWS[rows](16, n), topk)


def test_nan_and_positive_infinity_make_a_row_nan_and_no_other(kind: Recorder) -> None:
    scores = torch.randn(3, 21)
    scores[0, 1], scores[2, 20] = NAN, INF
    result = weights(scores, 2)
    assert result[0].isnan().all()
    assert result[2].isnan().all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("tolerance", [0.1, 0.5])
def test_within_a_tolerance(tolerance: float, kind: Recorder) -> None:
    for scores in (torch.randn(16, 61), torch.randint(-3, 4, (16, 61)).float()):
        found = torch.ops.kvt.topk_softmax(scores, 1, 20, torch.float32, NAME, tolerance)
        assert within_tolerance(scores.double(), found > 0, 20, tolerance).all()
        if len(scores.unique()) > 100:
            assert ((found > 0).sum(-1) != 20).any()  # it is made use of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [-1, 1])
def test_dtypes_and_dimensions(dtype: torch.dtype, dim: int, kind: Recorder) -> None:
    scores = torch.randn(2, 19, 11).to(dtype).requires_grad_()
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
    assert kind.asked == ["softmax", "softmax_backward"]


@pytest.mark.parametrize(("shape", "dim"), [((), 0), ((0, 4), 1), ((4, 0), 1), ((1,), 0)], ids=str)
def test_small_shapes(shape: tuple[int, ...], dim: int, kind: Recorder) -> None:
    scores = torch.zeros(shape, requires_grad=True)
    result = weights(scores, 2, dim)
    assert torch.equal(result, torch.ones(shape))
    (gradient,) = torch.autograd.grad(result.sum(), scores)
    assert torch.equal(gradient, torch.zeros(shape))
