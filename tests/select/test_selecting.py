"""A selection in a model: where tokens stand is read from the graph or told; a site without an answer stays dense."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vision import Change, Transformer, Windowed

import kvt_compile
from kvt_compile.config import OptionError
from kvt_compile.report.kernel_spec import computed_share, selection_text

IMAGE = torch.randn(2, 3, 20, 28)


def explained(model: nn.Module, image: Tensor = IMAGE, **options: Any) -> list[str]:
    """Of each site its selection, or why it is left dense."""
    return [site.reason or site.selection for site in kvt_compile.explain(model.eval(), image, **options).sites]


@pytest.mark.parametrize(
    ("model", "image", "grid"),
    [
        (Transformer(), IMAGE, "5x7 + 1"),
        (Transformer(prefix=5), IMAGE, "5x7 + 5"),
        (Transformer(prefix=0), IMAGE, "5x7"),
        (Transformer(change=lambda x: F.gelu(x) * 2.0), IMAGE, "5x7 + 1"),
        (Windowed(), torch.randn(2, 3, 16, 24), "4x4"),
    ],
    ids=["class token", "registers", "no prefix", "pointwise between", "windows of a map"],
)
def test_where_tokens_stand_is_read_from_the_graph(model: nn.Module, image: Tensor, grid: str) -> None:
    found = explained(model, image, select="window(3) | prefix")
    assert found
    assert all(x.startswith(f"window(3) | prefix on {grid}: ") for x in found)


def test_the_table_and_the_page_show_what_is_kept_and_what_is_computed(tmp_path: Any) -> None:
    report = kvt_compile.explain(Transformer().eval(), IMAGE, select="window(3) | prefix")
    # two patches of 4 x 8 places: 28 queries that keep all 36 keys among them, and 7 that keep 3 rows and the prefix
    kept, computed = (36 + 35 * 10) / 36**2, (36 + 28 * 36 + 7 * 22) / 36**2
    shown = f"window(3) | prefix on 5x7 + 1: {100 * kept:.3g} % of the keys, {100 * computed:.3g} % computed"
    assert computed_share(report.sites[0]) == computed
    assert selection_text(report.sites[0]) == shown
    assert " ".join(shown.split()) in " ".join(str(report).split())
    assert shown in report.to_html(tmp_path / "page.html").read_text()
    torch_s = kvt_compile.explain(Transformer().eval(), IMAGE, select="window(3) | prefix", lowering="aten").sites[0]
    assert computed_share(torch_s) is None


def test_what_tensors_choose_is_computed_as_it_is_kept() -> None:
    model = Transformer().eval()
    for text, share in (
        ("keys(9)", 9 / 36),
        ("regions(2, 3) | prefix", (36 + 35 * (1 + 35 * 2 / 6)) / 36**2),  # on average over regions of any size
    ):
        site = kvt_compile.explain(model, IMAGE, select=text).sites[0]
        assert site.kept == pytest.approx(share)
        assert computed_share(site) == site.kept
    assert kvt_compile.explain(model, IMAGE, select="heads(1)").sites[0].kept == 0.5


ORDER = torch.randperm(35, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, ORDER],
        lambda x: x.index_select(1, ORDER),
        lambda x: x.flip(1),
        lambda x: x.roll(3, 1),
        lambda x: x.sort(1).values,
        lambda x: x.gather(1, ORDER[None, :, None].expand_as(x)),
        lambda x: torch.cat([x[:, 5:], x[:, :5]], 1),
        lambda x: torch.einsum("bnd,nm->bmd", x, torch.eye(35)[ORDER]),
    ],
    ids=["index", "index_select", "flip", "roll", "sort", "gather", "swapped parts", "a product with a permutation"],
)
def test_tokens_that_were_moved_are_nowhere(change: Change) -> None:
    found = explained(Transformer(change=change), select="window(3) | prefix")
    assert len(found) == 2
    assert all(x.startswith("where its tokens stand cannot be read from the graph; say it with grid=") for x in found)


class Merged(nn.Module):
    """A map in another shape before its tokens are one axis."""

    def __init__(self, before: Change) -> None:
        super().__init__()
        self.before, self.qkv = before, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).reshape(2, 35, 24).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("before", "grid"),
    [
        (lambda x: x, "on 5x7"),
        (lambda x: x.reshape(10, 7, 8), "cannot be read"),
        (lambda x: x.reshape(2 * 5, 1, 7, 8), "cannot be read"),
        (lambda x: x.permute(1, 0, 2, 3).reshape(5, 14, 8).reshape(5, 2, 7, 8).transpose(0, 1), "on 5x7"),
    ],
    ids=["a map", "rows of all images", "rows of all images, once more", "taken apart and put together"],
)
def test_a_dimension_with_more_than_tokens_is_no_side_of_a_map(before: Change, grid: str) -> None:
    (found,) = explained(Merged(before), torch.randn(2, 5, 7, 8), select="window(3)", unknown_attention="rewrite")
    assert grid in found


def test_what_is_added_to_tokens_moves_none_of_them() -> None:
    model = Transformer(change=lambda x: x + x[:, ORDER])
    assert all("on 5x7 + 1" in x for x in explained(model, select="window(3) | prefix"))


def test_what_the_user_says_goes_first() -> None:
    model = Transformer(change=lambda x: x[:, ORDER])
    assert "on 5x7 + 1" in explained(model, select="window(3) | prefix", grid=(5, 7), prefix=1)[0]
    assert "on 7x5 + 1" in explained(Transformer(), select="window(3) | prefix", grid=(7, -1))[0]
    assert "36 tokens without a prefix of 0 do not divide so" in explained(model, select="window(3)", grid=(5, -1))[0]
    by_path = {"blocks.0": (5, 7), "blocks.1": (35,)}
    found = explained(model, select="window(3) | prefix", grid=by_path, prefix={"*": 1})
    assert [x.split(":")[0] for x in found] == ["window(3) | prefix on 5x7 + 1", "window(3) | prefix on 35 + 1"]


def expected(model: Transformer, image: Tensor, map_of: Tensor) -> Tensor:
    """The model with a mask in every attention."""
    dense = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = lambda q, k, v: dense(q, k, v, map_of)  # type: ignore[assignment]
        return model(image)
    finally:
        F.scaled_dot_product_attention = dense


def neighbours() -> Tensor:
    """window(3) | prefix on 5 x 7 + 1."""
    kept = torch.ones(36, 36, dtype=torch.bool)
    for i in range(35):
        for j in range(35):
            y, x = min(max(i // 7, 1), 3), min(max(i % 7, 1), 5)
            kept[i + 1, j + 1] = abs(j // 7 - y) <= 1 and abs(j % 7 - x) <= 1
    return kept


@pytest.mark.parametrize("way", ["rewrite", "compile"])
def test_the_model_is_the_dense_one_with_the_map_as_its_mask(way: str) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    image = IMAGE.double()
    if way == "rewrite":
        mine: Any = kvt_compile.rewrite(model, image, select="window(3) | prefix").module
    else:
        options = {"select": "window(3) | prefix", "then": "eager"}
        mine = torch.compile(model, backend="kvt", options=options)
    out, target = mine(image), expected(model, image, neighbours())
    torch.testing.assert_close(out, target)
    weight = torch.randn_like(out)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(out, parameters, weight), torch.autograd.grad(target, parameters, weight), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_what_keeps_every_key_is_dense_or_equal_to_it() -> None:
    model = Transformer().double()
    image = IMAGE.double()
    assert explained(model, image, select="window(7) | prefix")[0].endswith("keeps all 36 keys")
    forced = kvt_compile.rewrite(model, image, select="window(7) | prefix", force_rewrite=True)
    assert forced.report.counts["fused"] == 2
    torch.testing.assert_close(forced.module(image), model(image))


def test_a_mapping_and_a_function_choose_by_site() -> None:
    model = Transformer()
    found = explained(model, select={"blocks.0": "window(3) | prefix", "*": None})
    assert [x.split(" on ")[0] for x in found] == ["window(3) | prefix", "select is None for this site"]
    found = explained(model, select=lambda site: "sinks(4)" if site.where.module == "blocks.1" else None)
    assert found == ["select is None for this site", "sinks(4): 11.1 % of the keys"]


def test_topk_is_one_word_of_it() -> None:
    one = kvt_compile.explain(Transformer(), IMAGE, select="topk(9)").sites
    other = kvt_compile.explain(Transformer(), IMAGE, topk=9).sites
    assert [site.topk for site in one] == [site.topk for site in other] == [9, 9]
    assert not any(site.select for site in one)


def test_a_program_with_a_selection_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Transformer().eval()
    program = torch.export.export(model, (IMAGE,))
    result = kvt_compile.rewrite(program, select="(window(3) | prefix) & topk(5)")
    assert result.program is not None
    torch.export.save(result.program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(IMAGE), result.module(IMAGE))


def test_a_grid_that_is_known_only_at_run_time() -> None:
    """An exported program of images of any size: the sizes of the map are read from it when it runs."""
    model = Transformer(grid=None).eval()
    sizes = {2: 4 * torch.export.Dim("rows", min=3, max=9), 3: 4 * torch.export.Dim("columns", min=3, max=9)}
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=(sizes,))
    for text in ("window(3) | prefix", "(regions(2, 2) | prefix) & topk(5)", "sinks(2) | prefix"):
        result = kvt_compile.rewrite(program, select=text)
        assert result.report.counts["fused"] == 2
        for image in (IMAGE, torch.randn(2, 3, 16, 36)):
            fixed = kvt_compile.rewrite(model, image, select=text)
            assert fixed.report.counts["fused"] == 2
            torch.testing.assert_close(result.module(image), fixed.module(image))
    site = kvt_compile.rewrite(program, select="window(3) | prefix", grid=(5, 7)).report.sites[0]
    assert "a grid of fixed sizes cannot say it" in site.reason
    site = kvt_compile.rewrite(program, select="regions(2, 2, heads=3) | prefix").report.sites[0]
    assert "2 heads do not divide into 3 groups" in site.reason


def test_groups_that_the_heads_of_a_site_do_not_divide_into() -> None:
    image, model = IMAGE, Transformer().eval()
    for text in ("regions(2, 2, heads=3) | prefix", "(regions(2, 2, heads=4) | prefix) & topk(5)"):
        assert all("heads do not divide into" in reason for reason in explained(model, select=text))
        compiled = torch.compile(model, backend="kvt", options={"select": text, "then": "eager"})
        torch.testing.assert_close(compiled(image), model(image))
    assert all(": " in found for found in explained(model, select="regions(2, 2, heads=2) | prefix"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "window(3)", "topk": 3}, "both given"),
        ({"select": "wndow(3)"}, "did you mean 'window'"),
        ({"select": {"nope": "sinks(1)"}}, "matches no attention site"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kvt_compile.explain(Transformer(), IMAGE, **options)


@pytest.mark.parametrize("options", [{"select": 3}, {"grid": "5x7"}, {"grid": (0, 5)}, {"prefix": -1}])
def test_options_of_another_type_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected"):
        kvt_compile.explain(Transformer(), IMAGE, **options)


def test_another_selection_without_another_capture() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    module = kvt_compile.rewrite(model, IMAGE, select="window(3) | prefix").module
    for text in ("halo(2, 1) | prefix", "(window(5) | prefix) & topk(4)", "topk(3)"):
        kvt_compile.set_select(module, text)
        fresh = kvt_compile.rewrite(model, IMAGE, select=text).module
        torch.testing.assert_close(module(IMAGE), fresh(IMAGE))
    kvt_compile.set_select(module, None)
    torch.testing.assert_close(module(IMAGE), model(IMAGE))
    kvt_compile.set_select(module, {"blocks.0": "window(3) | prefix"}, grid=(5, 7), prefix=1)
    fresh = kvt_compile.rewrite(model, IMAGE, select={"blocks.0": "window(3) | prefix", "*": None}).module
    torch.testing.assert_close(module(IMAGE), fresh(IMAGE))


def test_what_cannot_be_set_changes_nothing() -> None:
    model = Transformer().eval()
    module = kvt_compile.rewrite(model, IMAGE, topk=5).module
    before = module(IMAGE)
    with pytest.raises(kvt_compile.SelectionError, match="asks where tokens stand"):
        kvt_compile.set_select(module, {"blocks.0": "sinks(1)", "blocks.1": "window(3)"})
    with pytest.raises(OptionError, match="matches no attention site"):
        kvt_compile.set_select(module, {"nope": "sinks(1)"})
    with pytest.raises(OptionError, match="no selected attention in Linear"):
        kvt_compile.set_select(nn.Linear(2, 2), "sinks(1)")
    assert torch.equal(module(IMAGE), before)


FACTORY = """
import torch
from vision import Transformer


def factory():
    return Transformer(), (torch.randn(1, 3, 20, 28),)
"""


def test_the_command_line_shows_a_selection(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from kvt_compile.cli import main

    (tmp_path / "model.py").write_text(FACTORY)
    spec = f"{tmp_path / 'model.py'}:factory"
    with pytest.raises(SystemExit) as ended:
        main(["explain", spec, "--select", "window(3) | prefix", "--json"])
    assert not ended.value.code
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["select"], site["grid"]) for site in sites] == [("window(3) | prefix", "5x7 + 1")] * 2
    for wrong in (["--topk", "3"], ["--grid", "5,7"]):
        with pytest.raises(SystemExit) as ended:
            main(["explain", spec, "--select", "window(3) | prefix", *wrong])
        assert ended.value.code
