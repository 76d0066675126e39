"""NaN and infinities that a model makes or takes away: what comes out is what the model says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rewritten import N, Scores, Weighed, inputs, outcome
from torch import Tensor, nn

import kvt_compile

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FORCED = {"topk": 1.0, "force_rewrite": True}


def zeros_for_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).nan_to_num(0) @ v


def chosen_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    return torch.where(w.isnan(), 0, w) @ v


def filled_where_not_equal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT - 1.0).softmax(-1)
    return w.masked_fill(w != w, 0.0) @ v


def zeros_and_a_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 0.5 * (q @ k.mT).softmax(-1).nan_to_num() @ v


def nothing_for_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def attention_of(model: Attention, *inputs: Tensor) -> nn.Module:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return model(q, k, v)

    result = kvt_compile.rewrite(Model(), *inputs, **FORCED)
    assert result.report.counts["fused"] == 1
    return result.module


@pytest.mark.parametrize(
    "model", [zeros_for_nan, chosen_by_where, filled_where_not_equal, zeros_and_a_gate, nothing_for_nan]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_nan_weights(model: Attention, bad: float) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4)
    inputs[0][0, 0, 1, 3] = bad
    found = []
    for run in (model, attention_of(model, *inputs)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert found[0][0].isnan().any() == (model is nothing_for_nan)


# ---- what a mask shuts off in a row of NaN ---------------------------------------------------------------------------

PADDING = torch.arange(6) > 3
MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda s, b: (s + b).masked_fill(PADDING, -torch.inf),
    "filled, then scaled": lambda s, b: 0.5 * (s + b).masked_fill(PADDING, -1e30),
    "chosen": lambda s, b: torch.where(PADDING, -1e9, s * 0.25 - b),
    "chosen twice": lambda s, b: torch.where(PADDING, -1e9, torch.where(s > 0, s, 0.1 * s) + b),
    "clamped": lambda s, b: torch.where(PADDING, -1e9, s + b).clamp(max=60.0) + b.nan_to_num(0.0, 0.0),
    "soft-capped": lambda s, b: (9 * torch.tanh(s / 9) + b).masked_fill(PADDING, -torch.inf),
    "a sum": lambda s, b: s + b + torch.where(PADDING, -torch.inf, 0.0),
}


@pytest.mark.parametrize("lowering", ["aten", "c"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_keys_of_a_row_of_nan_have_the_model_s_gradients(name: str, lowering: str) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
            return MASKED[name](q @ k.mT, b).softmax(-1) @ v

    torch.manual_seed(0)
    inputs = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 5, 6)
    inputs[3][0, 0, 1] = torch.nan
    result = kvt_compile.rewrite(Model(), *inputs, **FORCED, lowering=lowering)
    assert result.report.counts["fused"] == 1
    found = []
    for run in (Model(), result.module):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found.append(torch.autograd.grad(run(*leaves)[:, :, [0, 1, 3]].sin().sum(), leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert found[0][3][0, 0, 1].isnan().any()
    assert found[0][3][0, 0, 1, PADDING].isnan().any() == (name in ("a sum", "clamped"))


def divided_by_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / 0.0) @ k.mT).softmax(-1).nan_to_num() @ v


def times_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k * torch.inf).mT).softmax(-1).nan_to_num() @ v


def times_and_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 2.0 / 0.0) @ k.mT).clamp(-1, 1).nan_to_num().softmax(-1) @ v


def halved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / 2.0) @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("model", [divided_by_zero, times_infinity, times_and_divided, halved])
def test_a_factor_moves_onto_the_scores_only_where_it_is_finite(model: Attention) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4)
    module = attention_of(model, *inputs)
    torch.testing.assert_close(module(*inputs), model(*inputs))
    moved = not any(n.op == "call_function" and "div" in str(n.target) for n in module.graph.nodes)  # type: ignore[union-attr]
    assert moved == (model in (halved, times_infinity))


# ---- rows without a valid key: NaN in the model, zeros here ----------------------------------------------------------

DEAD = torch.arange(N)[:, None] % 3 == 0
GATE = torch.rand(N, N, generator=torch.Generator().manual_seed(5))
ZEROS: dict[str, Scores] = {
    "zeros": lambda p: p.nan_to_num(0.0),
    "zeros, chosen": lambda p: torch.where(p.isnan(), 0.0, p),
    "zeros where it is no number": lambda p: torch.where(~p.isnan(), p, 0.0),
    "zeros in the whole row": lambda p: p.masked_fill(p.isnan().any(-1, True), 0.0),
}
NUMBERS: dict[str, Scores] = {
    "a number": lambda p: p.nan_to_num(1 / N),
    "a number, chosen": lambda p: p.masked_fill(p != p, 1 / N),
    "a gate": lambda p: torch.where(p.isnan(), GATE, p),
    "a gate where the double is none": lambda p: torch.where((2 * p).isnan(), GATE, p),
    "a gate in the whole row": lambda p: torch.where(p.isnan().any(-1, True), GATE, p),
    "a sum": lambda p: p.nan_to_num(0.0) + 0.1 * p.isnan(),
}


def dead_rows(s: Tensor) -> Tensor:
    return s.masked_fill(DEAD, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", ZEROS)
def test_rows_without_a_key_are_zeros(name: str) -> None:
    assert outcome(Weighed(lambda s: ZEROS[name](dead_rows(s))), [x.detach() for x in inputs()]) != "dense"


@pytest.mark.parametrize("name", NUMBERS)
def test_rows_without_a_key_that_get_numbers(name: str) -> None:
    assert outcome(Weighed(lambda s: NUMBERS[name](dead_rows(s))), [x.detach() for x in inputs()]) == "dense"
