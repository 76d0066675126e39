"""`torch.masked.softmax` is a softmax of what its mask has, as Dynamo records it and as torch.export does."""

from __future__ import annotations

import pytest
import torch
from own_selections import NK, NQ, B, H, tensors
from readings import module_of
from test_own_selection import ALIKE, captured
from torch import Tensor

import kvt_compile
from kvt_compile.passes.decide import Policy

KEEP = torch.ones(NQ, NK, dtype=torch.bool).tril(3)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.masked.softmax(q @ k.mT, -1, mask=KEEP.expand(B, H, NQ, NK)) @ v


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.masked.softmax(q @ k.mT, dim=-1) @ v


def logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.masked.log_softmax(q @ k.mT, -1, mask=KEEP).exp() @ v


def by_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.masked.softmax(q @ k.mT, -1, mask=KEEP.long()) @ v


@pytest.mark.parametrize("model", [masked, whole, logarithm])
def test_fused(model: object) -> None:
    policy = Policy(topk=1.0, force_rewrite=True)
    _, result, call = captured(module_of(model), tensors(), policy)  # type: ignore[arg-type]
    assert [decision.site.tier for decision in result.decisions] == ["fused"]
    assert not result.refusals
    torch.testing.assert_close(call(*tensors()), model(*tensors()), rtol=ALIKE, atol=ALIKE)  # type: ignore[operator]


def test_by_export() -> None:
    result = kvt_compile.rewrite(module_of(masked), *tensors(), topk=1.0, force_rewrite=True, lowering="aten")
    assert [site.outcome for site in result.report.sites] == ["fused"]
    torch.testing.assert_close(result.module(*tensors()), masked(*tensors()), rtol=ALIKE, atol=ALIKE)


def test_a_mask_of_numbers_is_named() -> None:
    _, result, _ = captured(module_of(by_numbers), tensors(), Policy())
    assert not result.decisions
    assert [refusal.reason for refusal in result.refusals] == ["masked_softmax with these arguments is not understood"]
