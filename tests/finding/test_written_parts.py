"""Scores and weights put together of parts: written slices with a step, stacked terms, zeros given as tensors.

Each is fused and means the same, outputs and gradients; each has a neighbour that looks like it and is not fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_check import traced
from normalisers import Normalised, inputs
from spelling_checks import captured_by_dynamo
from spellings import D, H, N
from test_any_softmax import ALL, assert_same, run
from torch import Tensor, fx

from kvt_compile.passes.pipeline import PassResult, run_passes

Function = Callable[[Any, Tensor, Tensor], Tensor]


def _every_second_row(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.clone()
    s[:, :, 1::2] += m.bias[:, 1::2]
    return s.softmax(-1) @ v


def _every_third_key(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.clone()
    s[..., ::3] = s[..., ::3] * 0.5 + m.gain[::3]
    return s.softmax(-1) @ v


def _every_second_head(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.clone()
    s[:, 1::2] = s[:, 1::2] + m.bias[1::2]
    return s.softmax(-1) @ v


def _odd_rows_and_even_keys(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.clone()
    s[:, :, 1:4:2, ::2] = -1e4
    return s.softmax(-1) @ v


def _stack_summed(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return torch.stack([s, m.bias.expand_as(s)]).sum(0).softmax(-1) @ v


def _stack_averaged(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return torch.stack([s, s.tanh(), m.bias.expand_as(s)], 2).mean(2).softmax(-1) @ v


def _stack_by_einsum(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nbhij->bhij", torch.stack([s, m.bias.expand_as(s)])).softmax(-1) @ v


def _cat_summed(m: Any, s: Tensor, v: Tensor) -> Tensor:
    terms = [s.unsqueeze(0), m.bias.expand_as(s).unsqueeze(0)]
    return torch.cat(terms).sum(dim=0).softmax(-1) @ v


def _zero_as_a_tensor(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1).masked_fill(~m.mask, torch.tensor(0.0, dtype=v.dtype)) @ v


def _zeros_chosen(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return torch.where(m.mask, s.softmax(-1), torch.zeros((), dtype=v.dtype)) @ v


FUSED = (
    _every_second_row, _every_third_key, _every_second_head, _odd_rows_and_even_keys, _stack_summed, _stack_averaged,
    _stack_by_einsum, _cat_summed, _zero_as_a_tensor, _zeros_chosen,
)  # fmt: skip


def _slices_of_softmaxes(m: Any, s: Tensor, v: Tensor) -> Tensor:
    """The weights, and not the scores, are written to."""
    weights = s.softmax(-1).clone()
    weights[..., ::2] = 0.1
    return weights @ v


def _largest_of_a_stack(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return torch.stack([s, m.bias.expand_as(s)]).amax(0).softmax(-1) @ v


def _stack_along_the_keys(m: Any, s: Tensor, v: Tensor) -> Tensor:
    """Two maps side by side are summed after the softmax, over both."""
    return torch.stack([s, m.bias.expand_as(s)], -1).flatten(-2).softmax(-1).unflatten(-1, (N, 2)).sum(-1) @ v


def _a_tensor_that_is_not_zero(m: Any, s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1).masked_fill(~m.mask, torch.tensor(0.1, dtype=v.dtype)) @ v


def _a_row_that_has_keys_is_zero(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.masked_fill(~m.mask, -torch.inf)
    return s.softmax(-1).masked_fill((s == -torch.inf).any(-1, True), 0.0) @ v


def _a_key_that_no_row_has_is_zero(m: Any, s: Tensor, v: Tensor) -> Tensor:
    s = s.masked_fill(~m.mask, -torch.inf)
    return s.softmax(-1).masked_fill((s == -torch.inf).all(-2, True), 0.0) @ v


OTHER = (
    _slices_of_softmaxes, _largest_of_a_stack, _stack_along_the_keys, _a_tensor_that_is_not_zero,
    _a_row_that_has_keys_is_zero, _a_key_that_no_row_has_is_zero,
)  # fmt: skip


def _rewritten(function: Function) -> tuple[Normalised, Callable[..., Any], PassResult]:
    module = Normalised(function).double()
    graph = traced(module, inputs())
    result = run_passes(graph, ALL, lowering="aten")
    return module, fx.Interpreter(graph).run, result


@pytest.mark.parametrize("function", FUSED, ids=lambda function: function.__name__)
def test_fused(function: Function) -> None:
    module, call, result = _rewritten(function)
    assert [decision.site.tier for decision in result.decisions] == ["fused"], result.decisions[0].site.tier_reason
    assert not result.refusals
    assert_same(run(call, module), run(module, module))


@pytest.mark.parametrize("function", OTHER, ids=lambda function: function.__name__)
def test_neighbours(function: Function) -> None:
    module, call, result = _rewritten(function)
    assert "fused" not in [decision.site.tier for decision in result.decisions]
    assert all(decision.site.tier_reason for decision in result.decisions)
    assert_same(run(call, module), run(module, module))


@pytest.mark.parametrize("function", [_every_second_row, _stack_averaged, _zero_as_a_tensor])
def test_by_dynamo(function: Function) -> None:
    module = Normalised(function).double()
    _, _, result, call = captured_by_dynamo(module, inputs(), ALL)
    assert [decision.site.tier for decision in result.decisions] == ["fused"]
    assert_same(run(call, module), run(module, module))


def test_sizes() -> None:
    assert (H, N, D) == (3, 5, 4), "every third key and every second row are not all of them"
