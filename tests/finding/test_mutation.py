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
from torch import Tensor, nn

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


class InPlaceModule(nn.Module):
    """What a module writes in place is read again, and what it returns is not."""

    def __init__(self, written: nn.Module) -> None:
        super().__init__()
        self.written = written

    def forward(self, q: Tensor) -> Tensor:
        x = q @ q.mT
        self.written(x)
        return x.softmax(-1) @ q


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.Hardtanh, nn.ReLU6])
def test_a_module_that_writes_in_place(kind: Callable[..., nn.Module], inplace: bool) -> None:
    """symbolic_trace leaves it one node, whose result nobody reads."""
    model, q = InPlaceModule(kind(inplace=inplace)), torch.randn(2, 2, 6, 4, dtype=torch.float64)
    result = kvt_compile.rewrite(model, q, topk=1.0, force_rewrite=True)
    torch.testing.assert_close(result.module(q), model(q), rtol=1e-9, atol=1e-9)


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


def _through_detach(m: Tensor, t: Tensor) -> None:
    m.detach().add_(t.mean())


def _twice_through_a_view(m: Tensor, t: Tensor) -> None:
    m[2:].mul_(0.9).add_(t.mean())


def _through_data(m: Tensor, t: Tensor) -> None:
    m.data.lerp_(t.mean((0, 1, 2)), 0.5)


def _one_after_the_other(m: Tensor, t: Tensor) -> None:
    part = m.detach()
    part.mul_(0.9)
    part[1:].copy_(t[0, 0, 0, 1:])


def _masked(m: Tensor, t: Tensor) -> None:
    m.view(N, 1).detach().masked_fill_(t[0, 0, 0, :, None] > 0, 2.0)


def _of_all_at_once(m: Tensor, t: Tensor) -> None:
    torch._foreach_add_([m.detach()], [t.mean((0, 1, 2))])


class Statistics(nn.Module):
    """Keeps what it saw of the scores or the weights, in a buffer or in a tensor that it returns."""

    def __init__(self, write: Callable[[Tensor, Tensor], None], of: str, where: str) -> None:
        super().__init__()
        self.write, self.of, self.where = write, of, where
        self.register_buffer("m", torch.linspace(0.5, 1.0, N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        m = self.m if self.where == "buffer" else torch.ones_like(self.m)
        scores = q @ k.mT
        weights = scores.softmax(-1)
        self.write(m, (scores if self.of == "scores" else weights).detach())
        return weights @ v, m + 1.0


@pytest.mark.parametrize("where", ["buffer", "tensor"])
@pytest.mark.parametrize("of", ["scores", "weights"])
@pytest.mark.parametrize(
    "write",
    [_through_detach, _twice_through_a_view, _through_data, _one_after_the_other, _masked, _of_all_at_once],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_is_written_to_a_tensor_that_stays_is_not_dropped(
    write: Callable[[Tensor, Tensor], None], of: str, where: str
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    model, expected = Statistics(write, of, where), Statistics(write, of, where)
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="kvt", options={"topk": 1.0, "force_rewrite": True, "then": "eager", "lowering": "aten"}
    )
    for _ in range(2):
        torch.testing.assert_close(compiled(q, k, v), expected(q, k, v))
    torch.testing.assert_close(model.m, expected.m)


def _first_row_times(t: Tensor, c: Tensor) -> Tensor:
    t[:, :, :1] *= c
    return t


def _one_row_times(t: Tensor, c: Tensor) -> Tensor:
    t[:, :, 2].mul_(c)
    return t


def _joined(t: Tensor, c: Tensor) -> Tensor:
    return torch.cat([t[:, :, :2] * c, t[:, :, 2:]], dim=2)


def _divided(t: Tensor, c: Tensor) -> Tensor:
    t[:, :, 1:3] /= c
    return t


@pytest.mark.parametrize("lowering", ["aten", "c", "reference"])
@pytest.mark.parametrize(
    "scaled", [_first_row_times, _one_row_times, _joined, _divided], ids=lambda f: f.__name__.strip("_")
)
def test_a_factor_of_some_rows_has_a_gradient_of_those_alone(
    scaled: Callable[[Tensor, Tensor], Tensor], lowering: str
) -> None:
    """The masked scores of other rows are infinite, and nobody multiplies them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[3:, 1:3] = True
    c = torch.full((N,), 1.5, requires_grad=True)

    def model(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return scaled((q @ k.mT).masked_fill(mask, -torch.inf) * 0.5, c).softmax(-1) @ v

    torch.compiler.reset()
    options = {"topk": 1.0, "force_rewrite": True, "then": "eager", "lowering": lowering}
    compiled = torch.compile(model, backend="kvt", options=options)
    found, expected = (torch.autograd.grad(f(q, k, v, c).square().sum(), c)[0] for f in (compiled, model))
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
