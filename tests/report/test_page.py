"""The page, the picture and the diff of a report: what they are made of, and that they hold it all."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from factories import Stack, stack
from nets import Checkpointed, TalkingHeads
from test_report import REFUSAL, SITE, SWIN
from torch import nn

import kvt_compile
from kvt_compile.passes.finding.miss import NEAR
from kvt_compile.report.diff import site_diff
from kvt_compile.report.facts import GraphReport, NodeReport, SiteNodes, SiteReport
from kvt_compile.report.page import graph_svg, page
from kvt_compile.report.page.build import STEPS
from kvt_compile.report.page.cost import bytes_text, cost, flops_text
from kvt_compile.report.page.mathml import mathml
from kvt_compile.report.page.outline import Box, Leaf, outline
from kvt_compile.report.page.svg import assign_lanes
from kvt_compile.report.report import Report


def node(name: str, *inputs: str, module: str = "", target: str = "", kind: Any = "operation") -> NodeReport:
    target = target or name
    return NodeReport(
        name, kind, target, module, "net.py:3", inputs, (2, 3), "float32", f"{target}({', '.join(inputs)})"
    )


class Plain(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def plain(html: str) -> str:
    """Text of a piece of HTML, spaces removed."""
    return re.sub(r"\s|<[^>]*>", "", html)


@pytest.fixture(scope="module")
def report() -> Report:
    """Two sites, one of them left dense, and a softmax that is no attention."""
    model, inputs = stack()
    return kvt_compile.explain(model, *inputs, topk={"blocks.0": 3, "*": None}, lowering="c")


class TestGraphs:
    def test_a_site_owns_what_is_replaced(self, report: Report) -> None:
        (graph,) = report.graphs
        first, second = graph.sites
        assert first.before == ("transpose", "matmul", "scores", "softmax", "matmul_1")
        assert (first.anchor, first.anchor_after) == ("softmax", first.after[0])
        by_name = {n.name: n for n in graph.after}
        assert by_name[first.anchor_after].target == "kvt.attention"
        assert second.before == ("matmul_2", "scores_1", "softmax_1", "matmul_3")
        assert second.after == ()
        assert set(first.before).isdisjoint(by_name)
        assert graph.refusals == {0: "softmax_2"}

    def test_nodes_say_where_they_come_from(self, report: Report) -> None:
        by_name = {n.name: n for n in report.graphs[0].before}
        scores = by_name["scores"]
        assert (scores.module, scores.target, scores.inputs) == ("blocks.0", "mul", ("matmul",))
        assert scores.line.startswith("scores: [2, 2, 10, 10] = mul(matmul, 0.35355")
        assert scores.location.endswith("factories.py:21")
        assert by_name["linear"].code == "linear(args[0], weight, bias)"
        weights = [n.target for n in report.graphs[0].before if n.kind == "weight"]
        assert weights[0] == "blocks.0.qkv.weight"
        assert len(weights) == len(list(Stack().parameters()))

    def test_rewrite_shows_the_same_as_explain(self) -> None:
        model, inputs = stack()
        graphs = kvt_compile.rewrite(model, *inputs, topk=3).report.graphs
        assert [n.target for n in graphs[0].after if n.target.startswith("kvt")] == ["kvt.attention"] * 2
        assert [len(s.before) for s in graphs[0].sites] == [5, 5]

    def test_explain_runs_the_models_own_graph(self) -> None:
        """The rewrite for the picture comes after the run, and never into a module of the user's."""
        graph = torch.fx.symbolic_trace(Plain())
        code = graph.code
        report = kvt_compile.explain(graph, *(torch.randn(2, 10, 8) for _ in range(3)), topk=3)
        assert "kvt.attention(" in report.graph_after
        assert "kvt.attention(" not in report.graph_before
        assert graph.code == code

    def test_nested_graphs(self) -> None:
        report = kvt_compile.explain(Checkpointed().train(), torch.randn(2, 10, 16, requires_grad=True), topk=3)
        outer, *bodies = report.graphs
        assert (outer.sites, [b.name for b in bodies]) == ((), ["wrap_body_0", "wrap_body_1"])
        assert [s.site for b in bodies for s in b.sites] == [0, 1]
        assert all(s.anchor_after for b in bodies for s in b.sites)

    def test_scores_kept(self) -> None:
        report = kvt_compile.explain(TalkingHeads(), torch.randn(2, 10, 16), topk=3)
        (site,) = report.graphs[0].sites
        assert (site.before, report.sites[0].outcome) == (("softmax",), "scores-kept")
        lines = [str(line) for line in site_diff(report.graphs[0], site)]
        assert sum(line.startswith("- ") and "= softmax(" in line for line in lines) == 1
        assert sum(line.startswith("+ ") and "kvt.topk_softmax(" in line for line in lines) == 1


class TestDiff:
    GRAPH = GraphReport(
        0, "",
        (
            node("q"), node("k"), node("other"), node("mm", "q", "k"), node("far", "other"),
            node("sm", "mm"), node("y", "sm"),
        ),
        (node("q"), node("k"), node("other"), node("far", "other"), node("att", "q", "k"), node("y", "att")),
        (SiteNodes(0, "sm", ("mm", "sm"), ("att",), "att"),), {},
    )  # fmt: skip

    def test_only_what_changes_and_its_neighbours(self) -> None:
        lines = [str(line) for line in site_diff(self.GRAPH, self.GRAPH.sites[0])]
        assert lines == [
            "  q: [2, 3] = q()",
            "  k: [2, 3] = k()",
            "- mm: [2, 3] = mm(q, k)",
            "- sm: [2, 3] = sm(mm)",
            "- y: [2, 3] = y(sm)",
            "+ att: [2, 3] = att(q, k)",
            "+ y: [2, 3] = y(att)",
        ]

    def test_a_dense_site_has_no_change(self) -> None:
        dense = replace(self.GRAPH.sites[0], after=())
        assert {line.sign for line in site_diff(self.GRAPH, dense)} == {" "}

    def test_text_of_the_report(self, report: Report) -> None:
        head, *lines = report.diff.splitlines()
        assert head.startswith("@@ blocks.0 ")
        assert "blocks.1" not in report.diff  # it is left dense
        assert sum(line.startswith("+ ") and "kvt.attention(" in line for line in lines) == 1


class TestMath:
    @pytest.mark.parametrize(
        ("text", "drawn"),
        [
            ("0.125*s", "s√64"),
            ("0.5*s", "0.5⁢s"),
            ("0.1768*s + bias[h, i, j]", "0.1768⁢s+biash,i,j"),
            ("s + mask[b % 4, i, j]", "s+maskbmod4,i,j"),
            ("s - 2*(i + j)", "s−2⁢(i+j)"),
            ("s*temperature[h]", "s·temperatureh"),
            ("s + -x[i]", "s−xi"),
            ("tanh(s/30.0)", "tanh(s30)"),
            ("where(le(j, i), s, -oo)", "{sifj≤i−∞otherwise"),
            ("logical_and(a[i], logical_not(c[j]))", "ai∧¬cj"),
            ("1.5e-07*s", "1.5·10−7⁢s"),
            ("abs(s)**2", "|s|2"),
            ("(i + 3)//4", "⌊i+34⌋"),
        ],
        ids=str,
    )
    def test_reads_as_mathematics(self, text: str, drawn: str) -> None:
        html = mathml(text, head_dim=64)
        ElementTree.fromstring(html)  # well-formed
        assert html.startswith("<math>")
        assert plain(html.replace("<msqrt>", "√")) == drawn

    @pytest.mark.parametrize("text", ["a if b else c", "f(", "lambda: 0", "<script>", "mask.0[i, j] + s"], ids=str)
    def test_anything_else_is_shown_as_code(self, text: str) -> None:
        html = mathml(text)
        assert html.startswith("<code>")
        assert "<script>" not in html

    def test_scale_is_recognised_for_its_own_width_only(self) -> None:
        assert "msqrt" in mathml("0.17677669*s", head_dim=32)  # as float32 has it
        assert "msqrt" not in mathml("0.17677669*s", head_dim=64)
        assert "msqrt" not in mathml("0.17677669*s")


class TestCost:
    def test_fused(self) -> None:
        price = cost(SITE)  # 1x3 heads, 197x197, D 64, k 99
        assert price is not None
        assert (price.dense_bytes, price.knn_bytes) == (2 * 3 * 197 * 197 * 4, 2 * 3 * 197 * 4)
        assert price.dense_flops == 2 * 3 * 197 * 197 * 128
        assert price.knn_flops == 2 * 3 * 197 * (197 * 64 + 99 * 64)
        assert not price.per_example

    def test_scores_kept_has_the_maps(self) -> None:
        price = cost(replace(SITE, outcome="scores-kept", dtype="bfloat16"))
        assert price is not None
        assert price.knn_bytes == price.dense_bytes == 2 * 3 * 197 * 197 * 2
        assert price.knn_flops == price.dense_flops

    def test_dense_has_one_price(self) -> None:
        price = cost(replace(SITE, outcome="dense", topk=None))
        assert price is not None
        assert (price.knn_bytes, price.knn_flops) == (None, None)

    def test_dynamic_batch_counts_one_example(self) -> None:
        price, single = cost(replace(SITE, batch="4*s0")), cost(replace(SITE, batch=4))
        assert price is not None
        assert single is not None
        assert price.per_example
        assert price.dense_bytes == single.dense_bytes

    @pytest.mark.parametrize("size", ["?", "s0 of s1"], ids=str)
    def test_no_price_without_a_size(self, size: str) -> None:
        assert cost(replace(SITE, keys=size)) is None

    @pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_572_864, "1.57 MB")])
    def test_bytes(self, count: int, text: str) -> None:
        assert bytes_text(count) == text

    def test_nothing_is_a_dash(self) -> None:
        assert (bytes_text(None), flops_text(None), flops_text(2.1e9)) == ("—", "—", "2.1 GFLOP")


class TestOutline:
    GRAPH = GraphReport(
        0, "",
        (
            node("x", kind="input"), node("w", kind="weight"),
            node("norm", "x", "w", module="blocks.0.norm"), node("mm", "norm", module="blocks.0.attn"),
            node("sm", "mm", module="blocks.0.attn"), node("add", "x", "sm", module="blocks.0"),
            node("fc", "add", module="head.fc"), node("out", "fc", kind="output"),
        ),
        (), (SiteNodes(0, "sm", ("mm", "sm"), ()),), {},
    )  # fmt: skip

    def test_boxes_follow_the_modules(self) -> None:
        view = outline(self.GRAPH)

        def shape(box: Box) -> list[Any]:
            return [
                (x.module, x.node.name) if isinstance(x, Leaf) else (x.label, shape(x)) for x in box.children
            ]  # fmt: skip

        inner = [("norm", "norm"), ("attn", [("", "mm"), ("", "sm")]), ("", "add")]
        assert shape(view.root) == [("", "x"), ("blocks.0", inner), ("head.fc", "fc"), ("", "out")]
        assert [n.name for n in view.weights] == ["w"]
        assert view.edges == ((0, 1), (1, 2), (2, 3), (0, 4), (3, 4), (4, 5), (5, 6))

    def test_large_graphs_open_at_the_first_attention_only(self) -> None:
        nodes = tuple(
            node(f"n{layer}_{i}", f"n{layer}_{i - 1}", module=f"blocks.{layer}.attn")
            for layer in range(20)
            for i in range(5)
        )
        sites = tuple(SiteNodes(n, f"n{n}_2", (f"n{n}_2",), ()) for n in range(20))
        (blocks,) = outline(GraphReport(0, "", nodes, (), sites, {}), visible=30).root.children
        assert isinstance(blocks, Box)
        assert blocks.open
        assert [box.open for box in blocks.children if isinstance(box, Box)] == [True] + [False] * 19

    def test_lanes(self) -> None:
        lanes = assign_lanes({(0, 1), (1, 2), (0, 2), (2, 5), (3, 5), (0, 6)})
        assert lanes == {(0, 1): 0, (1, 2): 0, (0, 2): 1, (3, 5): 1, (2, 5): 2, (0, 6): 3}
        many = assign_lanes({(n, 100 + n) for n in range(50)})
        assert max(many.values()) < 20  # what finds no lane shares the last


class TestPicture:
    def test_is_one_row_a_node_with_the_sites_marked(self, report: Report) -> None:
        root = ElementTree.fromstring(graph_svg(report))
        texts = ["".join(x.itertext()).strip() for x in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any(text.startswith("softmax") and "fused, k = 3" in text for text in texts)
        classes = [x.get("class") for x in root.iter("{http://www.w3.org/2000/svg}rect")]
        assert (classes.count("fused"), classes.count("dense"), classes.count("refused")) == (5, 4, 1)

    def test_a_report_without_a_graph(self) -> None:
        with pytest.raises(LookupError, match="holds no graph"):
            graph_svg(Report((SITE,), ()))


class Addresses(HTMLParser):
    """Everything a page refers to, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.out: list[str] = []
        self.inside: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "data", "action") and value:
                (self.inside if value.startswith("#") else self.out).append(value)
            if name == "aria-controls" and value:
                self.inside.append(f"#{value}")
            if name == "id" and value:
                self.ids.append(value)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestPage:
    def test_holds_all_there_is(self, report: Report) -> None:
        text = page(report, "Stack")
        for wanted in (
            "<h1>Stack</h1>",
            "blocks.0",
            "factories.py:24",
            "topk is None for this site",
            "√" * 0 + "<msqrt>",
        ):
            assert wanted in text
        assert "its weights are not multiplied with values by a matrix product" in text
        assert text.count('<tbody class="site') == 2
        assert text.count("<template") == 1  # one kernel; the other site is dense
        assert "kvt.attention(" in text
        steps = re.search(r'<ol class="steps">(.*?)</ol>', text)
        assert steps
        assert re.findall(r'class="(done|failed|open)"', steps[1]) == ["done", "failed", *["open"] * 6]

    def test_is_well_formed_and_needs_nothing_else(self, report: Report) -> None:
        text = page(report)
        found = Addresses(text)
        assert found.open == []
        assert found.out == []
        assert len(set(found.ids)) == len(found.ids)
        assert {x[1:] for x in found.inside} <= set(found.ids)
        addresses = set(re.findall(r"https?://[\w./]+", text))
        assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
        assert "@import" not in text
        assert "url(" not in text

    def test_light_and_dark(self, report: Report) -> None:
        text = page(report)
        assert text.count("@media (prefers-color-scheme: dark)") == 2
        assert '<meta name="color-scheme" content="light dark">' in text

    def test_what_the_model_is_called_is_text(self) -> None:
        hostile = replace(SWIN, module="<img src=x>", location='"><script>', reason="<b>", outcome="scores-kept")
        text = page(Report((hostile,), (replace(REFUSAL, reason="<i>no</i>"),)), "<u>")
        for tag in ("<img", '"><script>', "<b>}", "<i>", "<u>"):
            assert tag not in text

    @pytest.mark.parametrize("report", [Report((), ()), Report((), (REFUSAL,)), Report((SITE, SWIN), ())], ids=repr)
    def test_reports_with_little_in_them(self, report: Report) -> None:
        text = page(report)
        assert Addresses(text).open == []
        assert ("No attention was found" in text) == (not report.sites)

    def test_sites_with_one_kernel_share_its_source(self) -> None:
        model, inputs = stack()
        text = page(kvt_compile.explain(model, *inputs, topk=3, lowering="c"))
        assert text.count("<template") == 1
        assert text.count('data-kernel="c-') == 2

    def test_torchs_operators_have_no_source(self) -> None:
        model, inputs = stack()
        text = page(kvt_compile.explain(model, *inputs, topk=3, lowering="aten"))
        assert "<template" not in text
        assert "it generates no code" in text

    def test_every_step_of_the_finder_has_words(self) -> None:
        assert tuple(STEPS) == ("capture", *NEAR)


class TestFiles:
    def test_whole_or_not_at_all(self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "out.html"
        assert report.to_html(target) == target
        before = target.read_text()

        def fails(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match=r"cannot write .*out\.html.*No space left"):
            report.to_html(target, title="other")
        assert target.read_text() == before
        assert list(tmp_path.iterdir()) == [target]

    def test_a_missing_folder(self, report: Report, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere.*make it first"):
            report.to_html(tmp_path / "nowhere" / "out.html")

    def test_a_folder(self, report: Report, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match="name a file in it"):
            report.to_svg(tmp_path)

    def test_others_may_read_it(self, report: Report, tmp_path: Path) -> None:
        mask = os.umask(0o022)
        try:
            assert report.to_svg(tmp_path / "a.svg").stat().st_mode & 0o777 == 0o644
        finally:
            os.umask(mask)


def test_the_node_a_step_failed_at_is_named() -> None:
    class Reads(nn.Module):
        """The scores are made of the values: refused somewhere before its softmax."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.cumsum(-1) @ x.transpose(-1, -2)).softmax(-1).cumsum(-1).tril() @ x

    report = kvt_compile.explain(Reads(), torch.randn(2, 5, 5))
    rows = [*report.refusals, *(s for s in report.sites if isinstance(s, SiteReport))]
    assert rows
    assert all(r.at != r.node for r in report.refusals)
