"""A site that selects by itself keeps its own k through every way in, unless a pattern of `topk` names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from official_kvt import KVT, Block
from torch import Tensor, nn

import kvt_compile
from kvt_compile.cli.topk import parse_topk
from kvt_compile.observe import observe


class Mixed(nn.Module):
    """A block that selects 5 of 17 keys by itself, then one of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Block(16, 2, 5)
        self.plain = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(self.own(x))
        return out


def mixed() -> tuple[Mixed, Tensor]:
    torch.manual_seed(0)
    return Mixed().double(), torch.randn(2, 17, 16, dtype=torch.float64)


def kept(**options: Any) -> list[tuple[str, object, bool]]:
    model, x = mixed()
    sites = kvt_compile.explain(model, x, **options).sites
    return [(site.outcome, site.topk, site.keeps_own) for site in sites]


@pytest.mark.parametrize(
    ("options", "own", "plain"),
    [
        ({}, ("fused", 5, True), ("fused", 9, False)),
        ({"topk": 3}, ("fused", 5, True), ("fused", 3, False)),
        ({"topk": None}, ("fused", 5, True), ("dense", None, False)),
        ({"topk": lambda site: 4}, ("fused", 5, True), ("fused", 4, False)),
        ({"topk": {"own.*": 3, "*": 8}}, ("fused", 3, False), ("fused", 8, False)),
        ({"topk": {"plain*": 8}}, ("fused", 5, True), ("fused", 8, False)),
        ({"topk": {"own.attn": None}}, ("dense", None, False), ("dense", None, False)),
        ({"topk": parse_topk(["plain*=8", "0.9"])}, ("fused", 5, True), ("fused", 8, False)),
        ({"exclude": ("own*",)}, ("dense", None, False), ("fused", 9, False)),
    ],
)
def test_only_a_pattern_replaces_it(options: dict[str, Any], own: object, plain: object) -> None:
    assert kept(**options) == [own, plain]


def test_the_users_k_replaces_the_models() -> None:
    model, x = mixed()
    named = kvt_compile.rewrite(model, x, topk={"own.attn": 3}, lowering="aten").module
    model.own.attn.topk = 3
    torch.testing.assert_close(named(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_tolerance_is_not_for_the_models_own_k() -> None:
    model, x = mixed()
    graph = kvt_compile.rewrite(model, x, topk_tolerance=0.5).module.graph
    tolerances = [node.args[-1] for node in graph.nodes if node.target is torch.ops.kvt.attention.default]
    assert tolerances == [0.0, 0.5]


def test_report_names_it() -> None:
    model, x = mixed()
    report = kvt_compile.explain(model, x)
    assert "own k = 5" in str(report)
    assert report.to_dict()["sites"][0]["own_k"] == "5"
    assert "own k = 5, replaced" in str(kvt_compile.explain(model, x, topk={"own.attn": 2}))


def test_page_names_it(tmp_path: Any) -> None:
    model, x = mixed()
    assert "own k = 5" in kvt_compile.explain(model, x).to_html(tmp_path / "page.html").read_text()


def test_set_topk_and_options_leave_it_unless_named() -> None:
    model, x = mixed()
    module = kvt_compile.rewrite(model, x, topk={"plain*": 17}, force_rewrite=True, lowering="aten").module
    expected = model(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    kvt_compile.set_topk(module, {"plain*": None})
    with kvt_compile.options(topk=None):
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    kvt_compile.set_topk(module, None)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    kvt_compile.set_topk(module, {"own.attn": 2})
    model.own.attn.topk = 2
    torch.testing.assert_close(module(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_saved_program_knows_it(tmp_path: Any) -> None:
    model, x = mixed()
    program = kvt_compile.rewrite(torch.export.export(model, (x,)), topk={"plain*": 17}, force_rewrite=True).program
    torch.export.save(program, tmp_path / "program.pt2")
    module = torch.export.load(tmp_path / "program.pt2").module()
    expected = module(x)
    kvt_compile.set_topk(module, None)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_calibrate_leaves_it_alone() -> None:
    model, _ = mixed()
    policy = kvt_compile.calibrate(model, torch.randn(8, 17, 16, dtype=torch.float64), mass=0.5, grid=(4, 8))
    assert [site.path for site in policy.sites] == ["plain.self_attn"]


def test_observe_tells_it() -> None:
    model, x = mixed()
    seen: list[tuple[int, bool]] = []
    observe(model, (x,), lambda call: seen.append((call.topk, call.keeps_own)))
    assert seen == [(5, True), (9, False)]


def test_official_model_trains_alike() -> None:
    """Outputs, and the gradients of every parameter, of KVT's own model; no map of tokens x tokens is left."""
    torch.manual_seed(0)
    model = KVT(size=32, patch=8, dim=32, heads=2, depth=2, topk=7, classes=5).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    report = kvt_compile.explain(model, images)
    assert [(site.outcome, site.topk, site.own_k) for site in report.sites] == [("fused", 7, "7")] * 2
    expected = model(images)
    wanted = list(model.parameters())
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    compiled = torch.compile(model, backend="kvt")
    out = compiled(images)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for found, right in zip(torch.autograd.grad(out.square().sum(), wanted), gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_all_of_its_keys() -> None:
    """k = N selects nothing: the model runs as it is, or fused with the same numbers."""
    torch.manual_seed(0)
    model = KVT(size=16, patch=8, dim=32, heads=2, depth=1, topk=5, classes=5).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    (site,) = kvt_compile.explain(model, images).sites
    assert (site.outcome, site.reason) == ("dense", "its own k = 5 keeps all 5 keys")
    module = kvt_compile.rewrite(model, images, force_rewrite=True).module
    torch.testing.assert_close(module(images), model(images), rtol=1e-12, atol=1e-12)
