"""How far two results may be apart."""

from __future__ import annotations

import pytest
import torch

from kvt_compile.verification.compare import FLOAT64, compare_tensors


@pytest.mark.parametrize(("tiny", "equal"), [(1e-22, True), (1e-17, True), (1e-12, False), (1e-3, False)])
def test_a_gradient_below_the_rounding_of_the_largest_is_zero(tiny: float, equal: bool) -> None:
    """Terms of size 1 that cancel leave what their order leaves."""
    of_q, of_v, zero = (torch.tensor([x], dtype=torch.float64) for x in (tiny, 1.0, 0.0))
    rows = [("gradient of q", zero, of_q, of_q), ("gradient of v", of_v, of_v, of_v)]
    assert all(x.ok for x in compare_tensors(rows, FLOAT64)) == equal
    assert not all(x.ok for x in compare_tensors(rows[:1], FLOAT64))


@pytest.mark.parametrize(("off", "equal"), [(3e-16, True), (3e-15, False)])
@pytest.mark.parametrize("size", [1e-9, 1e-12])
def test_a_small_gradient_in_float64_is_as_exact_as_its_terms(size: float, off: float, equal: bool) -> None:
    """A softmax that is almost all one key's: its gradients are differences of numbers of size 1."""
    of_q, of_v = (torch.tensor([x], dtype=torch.float64) for x in (size, 1.0))
    rows = [("gradient of q", of_q + off, of_q, of_q), ("gradient of v", of_v, of_v, of_v)]
    assert all(x.ok for x in compare_tensors(rows, FLOAT64)) == equal


def test_terms_of_the_largest_size_say_nothing_in_float32() -> None:
    of_q, of_v = (torch.tensor([x]) for x in (1e-9, 1.0))
    rows = [("gradient of q", of_q * 1.1, of_q, of_q.double()), ("gradient of v", of_v, of_v, of_v.double())]
    assert not all(x.ok for x in compare_tensors(rows))
