"""Module paths after a graph break, in a wrapper, and where blocks are compiled one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvt_compile


class Attention(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.qkv, self.broken = nn.Linear(8, 24), broken

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805 - as diffusers' and others' do
        q, k, v = this.qkv(x).chunk(3, -1)
        if this.broken:
            torch._dynamo.graph_break()
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v


class ByMethod(Attention):
    """Called by a method of its own, which no `__call__` stands around."""

    def attend(self, x: Tensor) -> Tensor:
        return Attention.forward(self, x)


class Block(nn.Module):
    def __init__(self, broken: str) -> None:
        super().__init__()
        self.attn, self.mlp, self.broken = Attention("attention" in broken), nn.Linear(8, 8), "block" in broken

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(broken) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Outer(nn.Module):
    """A training module around a model that was compiled by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def topk(site: Any) -> int | None:
    return 2 if site.where.module.endswith("1.attn") else None


OPTIONS: dict[str, Mapping[str, Any]] = {
    # each means: the block in the middle, and no other
    "include": {"topk": 2, "include": ["blocks.1.*"]},
    "exclude": {"topk": 2, "exclude": ["blocks.0*", "*.2.attn"]},
    "mapping": {"topk": {"blocks.1.attn": 2, "*": None}},
    "callable": {"topk": topk},
    "selections": {"select": {"blocks.1.attn": "topk(2)", "*": None}},
    "a selection and include": {"select": "topk(2)", "include": ["blocks.1.*"]},
    "a callable of selections": {"select": lambda site: None if topk(site) is None else "topk(2)"},
}
BROKEN = ["", "attention", "block", "attention and block"]


def expected(model: Model, x: Tensor) -> Tensor:
    for number, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(x).chunk(3, -1)
        scores = q @ k.mT * 8**-0.5
        if number == 1:
            scores = scores.masked_fill(scores < scores.topk(2, -1).values[..., -1:], -torch.inf)
        x = x + scores.softmax(-1) @ v
        x = x + block.mlp(x)
    return x


def compiled(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    return torch.compile(model, backend="kvt", options=dict(options))  # type: ignore[return-value]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("broken", BROKEN)
def test_options_by_path(broken: str, option: str) -> None:
    torch.manual_seed(0)
    model, x = Model(broken), torch.randn(2, 6, 8)
    torch.testing.assert_close(compiled(model, OPTIONS[option])(x), expected(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broken", BROKEN)
def test_reports_have_every_site_by_its_path(broken: str) -> None:
    report = kvt_compile.explain(Model(broken), torch.randn(2, 6, 8))
    assert [site.module for site in report.sites] == [f"blocks.{n}.attn" for n in range(3)]
    again = kvt_compile.explain(Model(broken), torch.randn(2, 6, 8), **OPTIONS["include"])
    assert [site.topk for site in again.sites] == [None, 2, None]


def by_block(model: Model, options: Mapping[str, Any]) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="kvt", options=dict(options))
    return model


def in_place(model: Model, options: Mapping[str, Any]) -> nn.Module:
    model.compile(backend="kvt", options=dict(options))
    return model


def within(model: Model, options: Mapping[str, Any]) -> nn.Module:
    return Outer(compiled(model, options))


def as_a_function(model: Model, options: Mapping[str, Any]) -> Any:
    return torch.compile(lambda net, x: net(x), backend="kvt", options=dict(options))


@pytest.mark.parametrize("way", [by_block, in_place, within], ids=lambda way: way.__name__)
@pytest.mark.parametrize("broken", ["", "attention"])
def test_however_it_is_compiled(broken: str, way: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Model(broken), torch.randn(2, 6, 8)
    reference = expected(model, x)
    torch.testing.assert_close(way(model, OPTIONS["include"])(x), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broken", ["", "attention"])
def test_a_model_that_is_an_argument(broken: str) -> None:
    torch.manual_seed(0)
    model, x = Model(broken), torch.randn(2, 6, 8)
    found = as_a_function(model, OPTIONS["mapping"])(model, x)
    torch.testing.assert_close(found, expected(model, x), rtol=1e-4, atol=1e-5)


def test_blocks_may_be_meant_by_their_own_paths() -> None:
    """What was compiled is a block: `attn` is a path in it, as `blocks.1.attn` is in the model."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 6, 8)
    reference = expected(model, x)
    for block, k in zip(model.blocks, (None, 2, None), strict=True):
        block.compile(backend="kvt", options={"topk": {"attn": k}})
    torch.testing.assert_close(model(x), reference, rtol=1e-4, atol=1e-5)


@contextmanager
def _process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("outside", [True, False], ids=["compiled", "wrapped"])
@pytest.mark.parametrize("broken", ["", "attention"])
def test_in_distributed_data_parallel(broken: str, outside: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Model(broken), torch.randn(2, 6, 8)
    reference = expected(model, x)
    with _process_group(tmp_path):
        wrap = nn.parallel.DistributedDataParallel
        wrapped = compiled(wrap(model), OPTIONS["include"]) if outside else wrap(compiled(model, OPTIONS["include"]))
        torch.testing.assert_close(wrapped(x), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 6, 8)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    with torch.no_grad():
        reference = expected(quantised, x)
        torch.testing.assert_close(compiled(quantised, OPTIONS["include"])(x), reference, rtol=1e-3, atol=1e-4)


def test_one_compilation_serves_what_is_decided_alike() -> None:
    model, x = Model("attention"), torch.randn(2, 6, 8)
    torch._dynamo.utils.counters.clear()
    compiled(model, {"topk": 2, "exclude": ["*nowhere*"]})(x)
    alike = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled(model, {"topk": 2})(x)
    assert alike == torch._dynamo.utils.counters["stats"]["unique_graphs"]


class _Layers(Model):
    """The three attentions, without blocks."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(ByMethod(broken) for _ in range(3))


class _Forwards(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            x = x + attention.forward(x)
        return x


class _Methods(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            x = x + attention.attend(x)
        return x


class _BrokenLoop(_Layers):
    """The loop runs outside of every graph, and each method in one of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            torch._dynamo.graph_break()
            x = x + attention.attend(x)
        return x


LAYERS = [
    pytest.param(_Forwards, True, id="forward"),
    pytest.param(_Methods, True, id="method"),
    pytest.param(_BrokenLoop, True, id="broken loop and method"),
    pytest.param(_BrokenLoop, False, id="broken loop"),
]


@pytest.mark.parametrize(("kind", "broken"), LAYERS)
def test_methods_that_one_compiled_graph_would_serve(kind: type[_Layers], broken: bool) -> None:
    """Each layer is a site by its own path, and options by path are right for each."""
    torch.manual_seed(0)
    model, x = kind(broken), torch.randn(2, 6, 8)
    report = kvt_compile.explain(model, x)
    assert [site.module for site in report.sites] == [f"attentions.{n}" for n in range(3)]
    assert not report.refusals
    reference = x
    for number, attention in enumerate(model.attentions):
        q, k, v = attention.qkv(reference).chunk(3, -1)
        scores = q @ k.mT * 8**-0.5
        if number == 1:
            scores = scores.masked_fill(scores < scores.topk(2, -1).values[..., -1:], -torch.inf)
        reference = reference + scores.softmax(-1) @ v
    for option in ({"topk": {"attentions.1": 2, "*": None}}, {"topk": 2, "exclude": ["*.0", "*.2"]}):
        torch.compiler.reset()
        torch.testing.assert_close(compiled(model, option)(x), reference, rtol=1e-4, atol=1e-5)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return (q @ k.mT).softmax(-1) @ v


class _Twice(nn.Module):
    """A function with a break, called from two places of one module, and from one place of a loop."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.first, self.second, self.loop = nn.Linear(8, 24), nn.Linear(8, 24), loop

    def forward(self, x: Tensor) -> Tensor:
        if self.loop:
            for layer in (self.first, self.second):
                x = x + attend(*layer(x).chunk(3, -1))
            return x
        x = attend(*self.first(x).chunk(3, -1))
        return attend(*self.second(x).chunk(3, -1))


def test_a_function_called_from_two_places_is_two_sites() -> None:
    report = kvt_compile.explain(_Twice(loop=False), torch.randn(2, 6, 8))
    assert [(site.module, site.runs) for site in report.sites] == [("", 1), ("", 1)]


def test_one_graph_that_a_loop_runs_says_how_often() -> None:
    report = kvt_compile.explain(_Twice(loop=True), torch.randn(2, 6, 8))
    assert sum(site.runs for site in report.sites) == 2
    if len(report.sites) == 1:
        assert "one compiled graph, which runs 2 times" in " ".join(str(report).split())


def test_layers_that_no_module_owns_are_one_compilation() -> None:
    """The neighbour: where nothing is decided by path, nothing is compiled twice."""
    model, x = _Methods(True), torch.randn(2, 6, 8)
    counts = []
    for options in ({"topk": 2}, {"topk": {"*": 2}}):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled(model, options)(x)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]
