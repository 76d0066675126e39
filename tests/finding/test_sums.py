"""A product with a sum of maps is a sum of products: what stays as it was, and what is not taken apart."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import kvt_compile
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes
from kvt_compile.report.report import Report

Combine = Callable[["TwoMaps", Tensor, Tensor, Tensor], Tensor]


class TwoMaps(nn.Module):
    def __init__(self, combine: Combine, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.combine = nn.Linear(12, 60), combine
        self.drop, self.lam = nn.Dropout(dropout), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, r, s, v = self.qkv(x).unflatten(-1, (5, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        first, second = (q @ k.mT / 2).softmax(-1), (r @ s.mT / 2).softmax(-1)
        return self.combine(self, first, second, v)


def difference(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    return (first - m.lam * second) @ v


def dropped_together(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    return m.drop(first - m.lam * second) @ v


def dropped_apart(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    return (m.drop(first) - m.lam * m.drop(second)) @ v


def made_without_grad(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = first - m.lam * second
    return weights @ v


def kept_map(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    weights = first - m.lam * second
    return weights @ v + weights.amax(-1, keepdim=True)


def without_its_mean(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    return (first - first.mean(-1, keepdim=True)) @ v


def tokens() -> Tensor:
    return torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def explained(combine: Combine, **options: object) -> Report:
    torch.manual_seed(0)
    module = TwoMaps(combine, dropout=0.2).double()
    return kvt_compile.explain(module, tokens(), topk=3, **options)  # type: ignore[arg-type]


def graph_of(module: nn.Module) -> fx.GraphModule:
    return torch.export.export(module, (tokens(),)).module()


@pytest.mark.parametrize("combine", [dropped_together, made_without_grad, kept_map])
def test_not_taken_apart(combine: Combine) -> None:
    assert [site.outcome for site in explained(combine).sites] == ["scores-kept"] * 2


def test_what_is_broadcast_along_the_keys_is_no_map(caplog: pytest.LogCaptureFixture) -> None:
    assert [site.outcome for site in explained(without_its_mean).sites] == ["scores-kept"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("combine", [difference, dropped_apart])
def test_each_map_is_fused(combine: Combine) -> None:
    assert [site.outcome for site in explained(combine).sites] == ["fused"] * 2


def test_left_dense_the_graph_is_the_models_own() -> None:
    module = TwoMaps(difference).double()
    graph = graph_of(module)
    before = [(node.op, str(node.target)) for node in graph.graph.nodes]
    result = run_passes(graph, Policy(topk=7))
    assert not result.changed
    assert [decision.reason for decision in result.decisions] == ["k = 7 keeps all 7 keys"] * 2
    assert [(node.op, str(node.target)) for node in graph.graph.nodes] == before


def test_one_map_alone_is_rewritten() -> None:
    """Sites decide for themselves: the other map stays dense, and the result is that of the two parts."""
    module = TwoMaps(difference).double()
    chosen = iter([3, None, 3, None])
    graph = graph_of(module)
    result = run_passes(graph, Policy(topk=lambda site: next(chosen)), lowering="aten")
    assert [decision.topk for decision in result.decisions] == [3, None]
    x = tokens()
    q, k, r, s, v = module.qkv(x).unflatten(-1, (5, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.mT / 2
    first = scores.masked_fill(scores < scores.topk(3).values[..., -1:], -torch.inf).softmax(-1)
    torch.testing.assert_close(graph(x), difference(module, first, (r @ s.mT / 2).softmax(-1), v))


class Halves(nn.Module):
    """One dropout, of which the two products read different elements."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rate = nn.Linear(8, 32), 0.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, r, s = self.qkv(x).chunk(4, -1)
        queries, keys = torch.stack([q, r], 1), torch.stack([k, s], 1)
        maps = nn.functional.dropout((queries @ keys.mT).softmax(-1), self.rate)
        return (maps[:, 0] - 0.5 * maps[:, 1]) @ x


def test_halves_that_drop_by_themselves() -> None:
    """On average it is the attention without dropout, and no two runs are alike."""
    torch.manual_seed(0)
    module, x = Halves().double(), torch.randn(1, 9, 8, dtype=torch.float64)
    plain = kvt_compile.rewrite(module, x, topk=4, lowering="aten").module(x)
    module.rate = 0.3
    result = kvt_compile.rewrite(module, x, topk=4, lowering="aten")
    assert [site.outcome for site in result.report.sites] == ["fused"] * 2
    runs = torch.stack([result.module(x) for _ in range(300)]).detach()
    deviation = runs.std(0)
    assert (deviation > 0).all()
    assert ((runs.mean(0) - plain).abs() < 6 * deviation / 300**0.5).all()


def test_dynamic_length() -> None:
    module = TwoMaps(difference).double()
    compiled = torch.compile(module, backend="kvt", dynamic=True, options={"topk": 1.0, "force_rewrite": True})
    for length in (7, 9):
        x = torch.randn(2, length, 12, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), module(x))


def test_half_precision() -> None:
    module = TwoMaps(difference)
    x = tokens().float()
    compiled = torch.compile(module, backend="kvt", options={"topk": 1.0, "force_rewrite": True})
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = compiled(x), module(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=0.03, atol=0.03)


def squared(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    weights = first + first @ first
    return weights / weights.sum(-1, keepdim=True) @ v


def from_outputs(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    weights = first + (first @ v @ v.mT).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def through_another(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    weights = first - 0.5 * (second @ first).mT.sigmoid()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def of_two_softmaxes(m: TwoMaps, first: Tensor, second: Tensor, v: Tensor) -> Tensor:
    weights = first + 0.5 * second
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("combine", [squared, from_outputs, through_another, of_two_softmaxes])
def test_a_map_that_a_product_makes_sums_to_nothing_known(combine: Combine) -> None:
    torch.manual_seed(0)
    module = TwoMaps(combine).double()
    result = kvt_compile.rewrite(module, tokens(), topk=1.0, force_rewrite=True)
    outcomes = {site.outcome for site in result.report.sites}
    assert ("scores-kept" in outcomes) == (combine is not of_two_softmaxes)
    torch.testing.assert_close(result.module(tokens()), module(tokens()))
