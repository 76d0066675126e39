"""Attention without a key or a query at the first call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def with_the_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("topk", [0.5, 1.0, 4])
@pytest.mark.parametrize("function", [attention, with_the_map])
@pytest.mark.parametrize(("queries", "keys"), [(4, 0), (0, 5), (0, 0), (4, 3)])
def test_none_of_them(function: Any, topk: Any, queries: int, keys: int) -> None:
    from kvt_compile.passes.canonical.modes import ambient
    from kvt_compile.passes.decide import Policy
    from kvt_compile.passes.pipeline import run_passes

    changed: list[bool] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        changed.append(run_passes(gm, Policy(topk, force_rewrite=True), entry=ambient()).changed)
        return gm.forward

    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, keys, keys)]

    found, expected = inputs(), inputs()
    ours, eager = torch.compile(function, backend=backend)(*found), function(*expected)
    if topk == 0.5 and keys:
        assert changed == [True]
        return
    torch.testing.assert_close(ours, eager)
    first = ours if isinstance(ours, Tensor) else ours[0]
    other = eager if isinstance(eager, Tensor) else eager[0]
    first.sum().backward()
    other.sum().backward()
    torch.testing.assert_close([x.grad for x in found], [x.grad for x in expected])
    assert changed == [True]
