"""Tensors that a model writes as numbers are read for what they are, however it is captured; what only looks like them,
and can change, is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from kvt_compile import explain, rewrite
from kvt_compile.report.facts import SiteReport

N = 8
GLOBAL = torch.tensor(0.0)
After = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """One attention; `after` is what happens to its weights."""

    def __init__(self, after: After) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("mask", torch.rand(N, N, generator=generator) > 0.7)
        self.register_buffer("zero", torch.tensor(0.0))
        self.plain = torch.tensor(0.0)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.after(self, (q @ k.mT * 8**-0.5).softmax(-1)) @ v


def _tensor(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(m.mask, torch.tensor(0.0))


def _whole_number(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.tensor(0), p)


def _list_of_one_number(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.tensor([0.0] * N), p)


def _zeros(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.zeros(1), p)


def _full_of_traced_sizes(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.full(p.shape[-2:], 0.0), p)


def _computed(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.ones(N) - torch.ones(1), p)


def _arange_beside_it(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(torch.arange(p.shape[-1]) > 5, torch.tensor(0.0))


READ = (_tensor, _whole_number, _list_of_one_number, _zeros, _full_of_traced_sizes, _computed, _arange_beside_it)


def _buffer(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(m.mask, m.zero)


def _attribute(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(m.mask, m.plain)


def _global(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(m.mask, GLOBAL)


def _not_zero(m: Model, p: Tensor) -> Tensor:
    return p.masked_fill(m.mask, torch.tensor(0.25))


def _several_numbers(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, torch.tensor([0.0] * (N - 1) + [1.0]), p)


def _view_of_a_buffer(m: Model, p: Tensor) -> Tensor:
    return torch.where(m.mask, m.zero.detach().view(1), p)


def _made_anew(m: Model, p: Tensor) -> Tensor:
    fill = torch.zeros(())
    fill += p.detach().mean()
    return torch.where(m.mask, fill, p)


OTHER = (_buffer, _attribute, _global, _not_zero, _several_numbers, _view_of_a_buffer)


def _by_dynamo(m: Model, x: Tensor) -> tuple[Callable[..., Any], SiteReport]:
    torch._dynamo.reset()
    run = torch.compile(m, backend="kvt", options={"topk": N, "force_rewrite": True, "then": "eager"})
    return run, explain(m, x, topk=N, force_rewrite=True).sites[0]


def _by_symbolic_trace(m: Model, x: Tensor) -> tuple[Callable[..., Any], SiteReport]:
    result = rewrite(m, x, topk=N, force_rewrite=True)
    assert result.program is None
    return result.module, result.report.sites[0]


def _by_export(m: Model, x: Tensor) -> tuple[Callable[..., Any], SiteReport]:
    result = rewrite(export(m, (x,)), x, topk=N, force_rewrite=True)
    return result.module, result.report.sites[0]


class _OnlyExport(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 16:
            raise ValueError("expected 16 features")
        return super().forward(x)


CAPTURES = pytest.mark.parametrize("captured", [_by_dynamo, _by_symbolic_trace, _by_export])


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    GLOBAL.zero_()


@CAPTURES
@pytest.mark.parametrize("after", READ, ids=lambda f: f.__name__)
def test_read_as_numbers(after: After, captured: Any) -> None:
    model, x = Model(after), torch.randn(2, N, 16)
    run, site = captured(model, x)
    assert site.outcome == "fused", site.reason
    torch.testing.assert_close(run(x), model(x))


@CAPTURES
@pytest.mark.parametrize("after", OTHER, ids=lambda f: f.__name__)
def test_neighbours(after: After, captured: Any) -> None:
    if after is _global and captured is _by_export:
        pytest.skip("a program that is given is copied, and nobody has the copy of its number")
    model, x = Model(after), torch.randn(2, N, 16)
    run, site = captured(model, x)
    assert site.outcome == "scores-kept"
    assert "revive" in site.reason
    torch.testing.assert_close(run(x), model(x))


@CAPTURES
@pytest.mark.parametrize("after", [_buffer, _global, _attribute], ids=lambda f: f.__name__)
def test_what_can_change_is_seen_to_change(after: After, captured: Any) -> None:
    if captured is _by_export:
        pytest.skip("a program is a copy of the model's state")
    model, x = Model(after), torch.randn(2, N, 16)
    run, _ = captured(model, x)
    before = run(x)
    with torch.no_grad():
        for x_ in (model.zero, model.plain, GLOBAL):
            x_.fill_(3.0)
    assert not torch.allclose(run(x), before)
    torch.testing.assert_close(run(x), model(x))


def test_a_fresh_program_of_export() -> None:
    """`rewrite` takes torch.export where a symbolic trace fails: a global stays what it is, a literal is one."""
    x = torch.randn(2, N, 16)
    outcomes = {}
    for after in (_tensor, _zeros, _global):
        model = _OnlyExport(after)
        result = rewrite(model, x, topk=N, force_rewrite=True)
        assert result.program is not None
        outcomes[after] = result.report.sites[0].outcome
        torch.testing.assert_close(result.module(x), model(x))
    assert outcomes == {_tensor: "fused", _zeros: "fused", _global: "scores-kept"}


class _GivesAway(Model):
    """Returns the number too: who has it may write to it."""

    def forward(self, x: Tensor) -> Any:
        zero = torch.zeros(1)
        self.after = lambda m, p: torch.where(m.mask, zero, p)
        return super().forward(x), zero


@pytest.mark.parametrize("kind", [_GivesAway, Model])
def test_what_is_made_anew_is_made_anew(kind: type[Model]) -> None:
    model, x = kind(_made_anew), torch.randn(2, N, 16)
    result = rewrite(model, x, topk=N, force_rewrite=True)
    for _ in range(2):
        found, expected = result.module(x), model(x)
        torch.testing.assert_close(found, expected)
        if kind is _GivesAway:
            found[1].fill_(7.0)
