"""What is known of a graph only when it runs: floats that Dynamo makes its inputs, sizes that are 1 after all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes

EVERYTHING = Policy(topk=1.0, force_rewrite=True)


class Scaled(nn.Module):
    """Attention whose score is `spelled` with a float of the module."""

    def __init__(self, spelled: Callable[[Scaled, Tensor, Tensor, Tensor], Tensor], number: float) -> None:
        super().__init__()
        self.qkv, self.spelled, self.number = nn.Linear(8, 24), spelled, number

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled(self, *self.qkv(x).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4))


SPELLED: dict[str, Callable[[Scaled, Tensor, Tensor, Tensor], Tensor]] = {
    "scores times it": lambda m, q, k, v: (q @ k.mT * m.number).softmax(-1) @ v,
    "queries times it": lambda m, q, k, v: (q * m.number @ k.mT).softmax(-1) @ v,
    "scores over it": lambda m, q, k, v: (q @ k.mT / m.number).softmax(-1) @ v,
    "its power": lambda m, q, k, v: (q @ k.mT * m.number**-0.5).softmax(-1) @ v,
    "arithmetic": lambda m, q, k, v: (q @ k.mT * (m.number * 2 + 1)).softmax(-1) @ v,
    "soft cap": lambda m, q, k, v: ((q @ k.mT / m.number).tanh() * m.number).softmax(-1) @ v,
    "SDPA": lambda m, q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, scale=m.number),
    "SDPA with a mask": lambda m, q, k, v: nn.functional.scaled_dot_product_attention(
        q, k, v, torch.ones(7, 7, dtype=torch.bool).tril(), scale=m.number * 0.5
    ),
    "masked with it": lambda m, q, k, v: (
        (q @ k.mT).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -100 * m.number).softmax(-1) @ v
    ),
}
NUMBERS = (0.3, 1.7, 2.5)  # the first is a constant of its graph, the second makes another graph that serves the third


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcome(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", SPELLED)
def test_a_float_that_is_an_input_is_part_of_the_score(name: str) -> None:
    tiers: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = run_passes(gm, EVERYTHING)
        tiers.extend(decision.site.tier for decision in found.decisions)
        assert not found.refusals
        return gm

    x = torch.randn(2, 7, 8, dtype=torch.float64)
    for number in NUMBERS:
        model = Scaled(SPELLED[name], number).double()
        torch.testing.assert_close(outcome(model, x, torch.compile(model, backend=backend)), outcome(model, x, model))
    graphs = 3 if "SDPA" in name else 2  # Dynamo makes a constant of the argument of a function that takes a float
    assert tiers == ["fused"] * graphs


@pytest.mark.parametrize("name", ["scores times it", "soft cap", "SDPA"])
def test_through_inductor(name: str) -> None:
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    for number in NUMBERS:
        model = Scaled(SPELLED[name], number).double()
        compiled = torch.compile(model, backend="kvt", options={"topk": 1.0, "force_rewrite": True})
        torch.testing.assert_close(outcome(model, x, compiled), outcome(model, x, model))


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_probability_that_is_an_input(training: bool) -> None:
    """Without training it is no dropout; with it the map is kept, as the op takes a number."""
    tiers: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tiers.extend(decision.site.tier for decision in run_passes(gm, EVERYTHING).decisions)
        return gm

    def dropped(m: Scaled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.dropout((q @ k.mT).softmax(-1), m.number, m.training) @ v

    for number in (0.25, 0.5):
        model = Scaled(dropped, number).train(training)
        torch.compile(model, backend=backend)(torch.randn(2, 7, 8))
    assert tiers == ["fused", "scores-kept" if training else "fused"]


def test_a_number_with_a_gradient_is_not_followed() -> None:
    """item() cuts the gradient of a learned scale; capturing the scale would not."""
    scale = nn.Parameter(torch.tensor(0.7))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * scale.item()).softmax(-1) @ v

    x = torch.randn(2, 5, 4, requires_grad=True)
    reasons: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = run_passes(gm, EVERYTHING)
        assert not any(decision.site.tier == "fused" for decision in found.decisions)
        reasons.extend(refusal.reason for refusal in found.refusals)
        return gm

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        y = torch.compile(attend, backend=backend)(x, x, x)
    y.sum().backward()
    assert scale.grad is None
    assert reasons == ["the scores are not a product of two computed tensors"]


def test_sdpa_with_a_dropout_probability_that_is_an_input() -> None:
    reasons: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        reasons.extend(refusal.reason for refusal in run_passes(gm, EVERYTHING).refusals)
        return gm

    def dropped(m: Scaled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=m.number, scale=m.number)

    for number in (0.25, 0.5):
        torch.compile(Scaled(dropped, number), backend=backend)(torch.randn(2, 7, 8))
    assert reasons == ["its dropout probability is known only at run time"]


@pytest.mark.parametrize("sdpa", [False, True])
def test_a_mask_that_broadcasts_in_a_dimension_whose_size_is_an_expression(sdpa: bool) -> None:
    """view(b, h, -1, n) with an unknown b: the size that is left is 1, but is written 7 // (2 // s)."""

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        q = k = v = x.view(x.shape[0], 7, 4, 6).transpose(1, 2)
        mask = mask.repeat_interleave(4, dim=0).view(x.shape[0], 4, -1, 7)
        if sdpa:
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT + mask).softmax(-1) @ v

    scores: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        scores.extend(decision.site.score for decision in run_passes(gm, EVERYTHING).decisions)
        return gm

    x, mask = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch.testing.assert_close(torch.compile(attend, backend=backend)(x, mask), attend(x, mask))
    assert len(scores) == 1
    assert scores[0].endswith("[b, h, 0, j]")


class Sized(nn.Module):
    """Attention whose scores, `[B, H, N, N]`, are `spelled` with its own sizes."""

    def __init__(self, spelled: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.qkv, self.spelled = nn.Linear(8, 24, dtype=torch.float64), spelled

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        head = width // 2
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, head).permute(2, 0, 3, 1, 4)
        weights: Tensor = self.spelled(q @ k.mT, head).softmax(-1) @ v
        return weights


SIZED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "root of the head": lambda t, head: t / math.sqrt(head),
    "power of the head": lambda t, head: t * head**-0.5,
    "root of the keys": lambda t, head: t / t.shape[-1] ** 0.5,
    "the keys": lambda t, head: t / t.shape[-1],
    "the batch": lambda t, head: t * t.shape[0],
    "both": lambda t, head: t * (t.shape[-1] ** 0.5 / head),
    "soft cap": lambda t, head: (t / t.shape[-1]).tanh() * t.shape[-1],
    "masked with it": lambda t, head: t.masked_fill(t > 1, -float(t.shape[-1])),
    "added to itself so often": lambda t, head: torch.add(t, t.relu(), alpha=t.shape[-1]),
    "a positive part, over it": lambda t, head: t.relu() * (1 / t.shape[-1]),
    "compared with it": lambda t, head: t.masked_fill(torch.arange(t.shape[-1]) > t.shape[-1] // 2, -1e4),
    "a float32 bias times it": lambda t, head: t + torch.ones(t.shape[-1]).cumsum(0) * t.shape[-1] ** 0.5,
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SIZED)
def test_a_number_made_of_sizes_is_part_of_the_score(name: str, dynamic: bool | None) -> None:
    model, tiers, number_of_graphs = Sized(SIZED[name]), [], 0

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal number_of_graphs
        number_of_graphs += 1
        found = run_passes(gm, EVERYTHING)
        assert not found.refusals
        tiers.extend(decision.site.tier for decision in found.decisions)
        return gm

    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for batch, tokens in ((2, 6), (3, 7), (5, 9)):
        x = torch.randn(batch, tokens, 8, dtype=torch.float64)
        torch.testing.assert_close(outcome(model, x, compiled), outcome(model, x, model))
    assert tiers == ["fused"] * number_of_graphs
    assert number_of_graphs < 3


@pytest.mark.parametrize("name", ["root of the keys", "masked with it"])
def test_a_number_made_of_sizes_through_inductor(name: str) -> None:
    model = Sized(SIZED[name])
    compiled = torch.compile(model, backend="kvt", options={"topk": 1.0, "force_rewrite": True}, dynamic=True)
    for batch, tokens in ((2, 6), (3, 7)):
        x = torch.randn(batch, tokens, 8, dtype=torch.float64)
        torch.testing.assert_close(outcome(model, x, compiled), outcome(model, x, model))


def test_sdpa_with_a_scale_made_of_sizes() -> None:
    tiers: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tiers.extend(decision.site.tier for decision in run_passes(gm, EVERYTHING).decisions)
        return gm

    def attend(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=0.1 * x.shape[-2] ** 0.5)

    compiled = torch.compile(attend, backend=backend, dynamic=True)
    for tokens in (6, 9):
        x = torch.randn(2, 2, tokens, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), attend(x))
    assert tiers == ["fused", "fused"]  # torch compiles it for each size: the function takes a float


def test_a_whole_number_that_a_tensor_holds() -> None:
    """It has no gradient, so that nothing is lost where it is captured."""
    tiers: list[str] = []

    def attend(x: Tensor, count: Tensor) -> Tensor:
        return (x @ x.mT * count.item()).softmax(-1) @ x

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tiers.extend(decision.site.tier for decision in run_passes(gm, EVERYTHING).decisions)
        return gm

    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, backend=backend)
        for count in (3, 2):
            torch.testing.assert_close(compiled(x, torch.tensor(count)), attend(x, torch.tensor(count)))
    assert tiers == ["fused"]
