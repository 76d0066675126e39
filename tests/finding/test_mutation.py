"""Writes are part of the meaning: followed exactly, or the attention is kept or refused.  Never dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import spellings_writes
import torch
from fuzz_check import traced
from readings import module_of
from spelling_checks import assert_fates, assert_meaning, rewritten_by
from spellings import B, D, H, N, Spelling, cases, from_file, spelling_of
from torch import Tensor

import kvt_compile
from kvt_compile.passes.site import Fused

mine = from_file(spellings_writes)


@cases(mine)
def test_by_dynamo(spelling: Spelling) -> None:
    """Dynamo records a write as a node nobody reads: `operator.setitem`, `operator.iadd`."""
    rewritten = rewritten_by(spelling, torch.float32)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float32, selecting=False)


@cases(mine)
def test_fewer_keys(spelling: Spelling) -> None:
    rewritten = rewritten_by(spelling, torch.float64, traced)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float64, selecting=True)


@cases(lambda s: mine(s) and s.trainable)
def test_by_export(spelling: Spelling) -> None:
    """In ATen graphs a slice is written by `aten.add_` on `aten.slice`."""
    module = spelling.build()
    result = kvt_compile.rewrite(torch.export.export(module, tuple(spelling.tensors())), topk=1.0, force_rewrite=True)
    torch.testing.assert_close(result.module(*spelling.tensors()), module(*spelling.tensors()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mvit_v2", "mvit_v2_assigned"])
def test_the_relative_position_bias_of_mvit_v2_is_not_dropped(name: str) -> None:
    """Nothing in the graph reads what `attn[:, :, 1:, 1:] += bias` returns: by edges alone it is plain attention."""
    spelling = spelling_of(name)
    rewritten = rewritten_by(spelling, torch.float64)
    (site,) = rewritten.sites
    assert isinstance(site.plan, Fused)
    assert site.captured, "the bias takes part in the scores"
    assert site.plan.score.startswith("where(ge(i, 1)")
    bias = [name for name in dict(rewritten.module.named_parameters()) if name in ("table", "rows", "columns")]
    with_bias = rewritten.with_arguments(topk=N)(*spelling.tensors())
    with torch.no_grad():
        for parameter in bias:
            rewritten.module.get_parameter(parameter).zero_()
    assert not torch.allclose(rewritten.call(*spelling.tensors()), with_bias), "the bias makes no difference"


def test_the_renormalisation_of_convit_is_not_dropped() -> None:
    spelling = spelling_of("weights_renormalised_in_place")
    rewritten = rewritten_by(spelling, torch.float64)
    assert rewritten.fates == ("scores-kept",)
    weights = rewritten.graph.graph
    assert any(getattr(node.target, "__name__", "") == "itruediv" for node in weights.nodes)


# ---- what happens outside the region ---------------------------------------------------------------------------------


def check(function: Callable[..., Any], *inputs: Tensor, topk: float | int = 1.0) -> list[str]:
    """Rewrites through torch.export and Dynamo-like capture; outputs and the inputs afterwards are the original's."""
    module = module_of(function)
    before = [x.clone() for x in inputs]
    with torch.no_grad():
        expected = module(*before)
        graph = traced(module, inputs)
        result = kvt_compile.rewrite(graph, *inputs, topk=topk, force_rewrite=True)
        after = [x.clone() for x in inputs]
        actual = result.module(*after)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    return [site.outcome for site in result.report.sites]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


QKV = ((B, H, N, D),) * 3


def test_an_input_that_is_written_stays_written() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask.mul_(2.0)
        return (q @ k.mT + mask).softmax(-1) @ v

    assert check(function, *tensors(*QKV, (N, N))) == ["fused"]


def test_an_input_that_is_written_after_it_was_read() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT + mask
        mask.zero_()
        return scores.softmax(-1) @ v

    assert check(function, *tensors(*QKV, (N, N))) == ["scores-kept"]


def test_an_input_that_is_written_after_everything() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = (q @ k.mT + mask).softmax(-1) @ v
        mask.zero_()
        return out

    assert check(function, *tensors(*QKV, (N, N))) == ["fused"]


def test_scores_written_to_a_buffer_of_the_caller() -> None:
    """The map is visible outside: it has to be made."""

    def function(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = q @ k.mT
        seen.copy_(scores)
        return scores.softmax(-1) @ v

    assert check(function, *tensors(*QKV, (B, H, N, N))) == ["scores-kept"]


def test_scores_made_in_a_buffer_of_the_caller() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        seen.copy_(q @ k.mT)
        seen += 1
        return seen.softmax(-1) @ v

    assert check(function, *tensors(*QKV, (B, H, N, N))) == ["scores-kept"]


def test_keys_in_a_cache() -> None:
    """A static cache: this step's keys are written to a slice of it, and all of it is attended to."""

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys[:, :, 2 : 2 + N] = k
        values[:, :, 2 : 2 + N] = v
        return (q @ keys.mT).softmax(-1) @ values

    assert check(function, *tensors(*QKV, (B, H, 9, D), (B, H, 9, D))) == ["fused"]


def test_keys_written_between_two_attentions() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.sin(k)
        first = (q @ k.mT).softmax(-1) @ v
        k += 1
        return first + (q @ k.mT).softmax(-1) @ v

    assert check(function, *tensors(*QKV)) == ["fused", "fused"]


def test_two_names_of_one_tensor() -> None:
    """A view made before a write shows the write; a result computed before it does not."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        rows = scores[:, :, :2]
        doubled = rows * 2
        rows.zero_()
        return scores.softmax(-1) @ v + doubled.sum()

    check(function, *tensors(*QKV))


@pytest.mark.parametrize("topk", [1.0, 2])
def test_a_map_filled_block_by_block(topk: float | int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.new_zeros(B, H, N, N)
        scores[:, :, :2] = q[:, :, :2] @ k.mT
        scores[:, :, 2:] = q[:, :, 2:] @ k.mT
        return scores.softmax(-1) @ v

    if topk == 1.0:
        check(function, *tensors(*QKV))
    else:
        inputs = tensors(*QKV)
        result = kvt_compile.rewrite(traced(module_of(function), inputs), *inputs, topk=topk)
        scores = inputs[0] @ inputs[1].mT
        kept = scores >= scores.topk(2, -1).values[..., -1:]
        expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ inputs[2]
        actual = result.module(*inputs)
        assert torch.allclose(actual, expected if result.report.sites else function(*inputs))


# ---- scores that take part in other scores ---------------------------------------------------------------------------


def test_one_item_of_a_batch_is_written() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.mul_(0.5)
        scores = scores.reshape(B, N * N).reshape(B, N, N) + q.sum(-1, keepdim=True)
        scores[0:1] += 1
        return scores.softmax(-1) @ v

    assert check(function, *tensors(*((B, N, D),) * 3)) == ["fused"]


def test_the_scores_of_one_item_are_made_of_another_item_s() -> None:
    """What the other's scores were is a tensor that the kernel would read beside its own: it needs the `mul_`, which no
    node of the graph reads."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.mul_(0.5)
        scores = scores.reshape(B, N * N).reshape(B, N, N) + q.sum(-1, keepdim=True)
        scores[0:1] = scores[1:] * 2
        return scores.softmax(-1) @ v

    assert check(function, *tensors(*((B, N, D),) * 3)) == ["scores-kept"]
