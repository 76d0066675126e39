"""Selections by places, quantiles and gathers, keys that were gathered by another score, and queries in chunks."""

from __future__ import annotations

import own_ranks
import pytest
import torch
from own_ranks import at, axes, in_chunks
from own_selections import OTHERS, OWN, B, H, K, Selecting, scores, tensors
from readings import module_of
from test_own_selection import ALIKE, captured, check_fused, check_left_alone
from torch import Tensor

from kvt_compile.passes.decide import Policy

HERE = own_ranks.__name__


@pytest.mark.parametrize("case", [x for x in OWN if x.forward.__module__ == HERE], ids=str)
def test_fused_with_its_own_k(case: Selecting) -> None:
    check_fused(case)


@pytest.mark.parametrize("case", [x for x in OTHERS if x.forward.__module__ == HERE], ids=str)
def test_left_alone(case: Selecting) -> None:
    check_left_alone(case)


def test_every_chunk_of_queries_keeps_its_own_k() -> None:
    _, result, call = captured(module_of(in_chunks), tensors(), Policy())
    assert [(d.site.tier, d.topk, d.own, d.site.queries) for d in result.decisions] == [
        ("fused", K, True, 3),
        ("fused", K, True, 3),
        ("fused", K, True, 1),
    ]
    assert not result.refusals
    torch.testing.assert_close(call(*tensors()), in_chunks(*tensors()), rtol=ALIKE, atol=ALIKE)


def by_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = (q.tanh() @ k.mT).topk(K).indices
    t = torch.einsum("bhid,bhimd->bhim", q, at(k, index))
    return torch.einsum("bhim,bhimd->bhid", t.softmax(-1), at(v, index))


def by_other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h = axes(B, H)
    index = (q @ k.flip(2).mT).topk(K).indices
    t = (q.unsqueeze(3) * k[b, h, index]).sum(-1)
    return (t.softmax(-1).unsqueeze(-1) * v[b, h, index]).sum(-2)


def with_other_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = scores(q, k).topk(K).indices
    t = torch.einsum("bhid,bhimd->bhim", q, at(k, index))
    return torch.einsum("bhim,bhimd->bhid", t.softmax(-1), at(v, index.flip(-1)))


def by_weights_of_hotter_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = ((q * 40.0) @ k.mT).softmax(-1).topk(K).indices  # most of them 0, and equal
    t = torch.einsum("bhid,bhimd->bhim", q, at(k, index)) * 0.5
    return torch.einsum("bhim,bhimd->bhid", t.softmax(-1), at(v, index))


@pytest.mark.parametrize("model", [by_other_scores, by_other_keys, with_other_values, by_weights_of_hotter_scores])
def test_keys_that_another_score_selected_are_the_models_keys(model: object) -> None:
    """Attention over what was gathered: a k of its own is not read into it."""
    _, result, _ = captured(module_of(model), tensors(), Policy())  # type: ignore[arg-type]
    assert [decision.own for decision in result.decisions] == [False]
    assert result.decisions[0].site.keys == K
