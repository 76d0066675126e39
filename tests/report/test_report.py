"""Report: rows from what the finder says, a table that fits 100 columns, a dict that is JSON."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch import fx

from kvt_compile.passes.site import AttentionSite, Captured, Refusal, Where
from kvt_compile.report.facts import RefusalReport, SiteReport
from kvt_compile.report.names import folded
from kvt_compile.report.report import Report
from kvt_compile.report.table import as_text, label

BIAS = Captured("bias_table", (3, 49, 49), "float32", "bias_table[h, i, j]", requires_grad=True)
MASK = Captured("mask", (4, 49, 49), "float32", "mask[b % 4, i, j]")
SITE = SiteReport(
    module="blocks.0.attn",
    location="timm/layers/attention.py:98",
    outcome="fused",
    reason="",
    axis="token",
    batch=1,
    heads=3,
    kv_heads=3,
    queries=197,
    keys=197,
    head_dim=64,
    value_dim=64,
    dtype="float32",
    topk=99,
    score="0.125*s",
    weight="p",
    captured=(),
    lowering="aten",
)
SWIN = replace(
    SITE,
    module="layers.0.blocks.1.attn",
    queries=49,
    keys=49,
    topk=25,
    score="0.17677669529663687*s + bias_table[h, i, j] + mask[b % 4, i, j]",
    captured=(BIAS, MASK),
)
REFUSAL = RefusalReport("softmax", "head", "net.py:7", "its result is the model's output", "values")


def site_of_finder(**changes: Any) -> AttentionSite:
    node = fx.Graph().placeholder("softmax")
    facts: dict[str, Any] = {
        "where": Where("blocks.0.attn", "/somewhere/net.py", 7),
        "softmax": node,
        "tier": "fused",
        "axis": "token",
        **{name: 1 for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")},
        "dtype": "float32",
        "score": "s",
        "weight": "p",
        "captured": (MASK,),
        "plan": SimpleNamespace(),  # the report does not look at it
        "tier_reason": "",
    }
    return AttentionSite(**(facts | changes))


class TestRows:
    def test_fused(self) -> None:
        row = SiteReport.of(site_of_finder(), topk=5, lowering="aten", graph=2)
        assert (row.module, row.location, row.outcome) == ("blocks.0.attn", "/somewhere/net.py:7", "fused")
        assert (row.topk, row.lowering, row.reason, row.graph, row.captured) == (5, "aten", "", 2, (MASK,))

    def test_scores_kept_says_why(self) -> None:
        row = SiteReport.of(site_of_finder(tier="scores-kept", tier_reason="heads are mixed"), topk=5, lowering="aten")
        assert (row.outcome, row.reason) == ("scores-kept", "heads are mixed")

    def test_dense_has_no_lowering_and_says_why(self) -> None:
        row = SiteReport.of(site_of_finder(), topk=None, reason="k = 9 keeps all 7 keys", lowering="aten")
        assert (row.outcome, row.topk, row.lowering, row.reason) == ("dense", None, "", "k = 9 keeps all 7 keys")

    def test_dense_does_not_give_the_tiers_reason(self) -> None:
        row = SiteReport.of(
            site_of_finder(tier="scores-kept", tier_reason="heads are mixed"), topk=None, reason="excluded"
        )
        assert row.reason == "excluded"

    def test_refusal(self) -> None:
        node = fx.Graph().placeholder("softmax_3")
        row = RefusalReport.of(Refusal(node, Where("head"), "its result is the model's output", "values"), graph=1)
        assert row == RefusalReport("softmax_3", "head", "", "its result is the model's output", "values", 1)

    def test_a_file_is_named_as_it_is_imported(self) -> None:
        import torch

        assert torch.__file__
        row = SiteReport.of(site_of_finder(where=Where("a", torch.__file__, 3)), topk=1)
        assert row.location == "torch/__init__.py:3"


class TestDict:
    def test_is_json_with_one_entry_per_site(self) -> None:
        report = Report(tuple(replace(SWIN, module=f"blocks.{n}") for n in range(3)), (REFUSAL,))
        data = json.loads(json.dumps(report.to_dict()))
        assert data["summary"] == {"sites": 3, "fused": 3, "scores-kept": 0, "dense": 0, "refusals": 1}
        assert [site["module"] for site in data["sites"]] == ["blocks.0", "blocks.1", "blocks.2"]
        assert data["sites"][0]["captured"][1] == {
            "name": "mask",
            "shape": [4, 49, 49],
            "dtype": "float32",
            "index": "mask[b % 4, i, j]",
            "requires_grad": False,
        }
        assert data["refusals"][0]["reason"] == REFUSAL.reason

    def test_symbolic_sizes_and_dense_sites(self) -> None:
        dense = replace(SITE, batch="s0", topk=None, outcome="dense")
        site = json.loads(json.dumps(Report((dense,), ()).to_dict()))["sites"][0]
        assert (site["batch"], site["topk"]) == ("s0", None)

    def test_report_can_be_kept(self) -> None:
        report = Report((SITE, SWIN), (REFUSAL,))
        assert pickle.loads(pickle.dumps(report)) == report


class TestTable:
    @pytest.mark.parametrize(
        ("report", "line"),
        [
            (Report((), ()), "0 sites: 0 fused, 0 scores-kept, 0 left dense; 0 softmaxes left alone"),
            (Report((SITE,), (REFUSAL,)), "1 site: 1 fused, 0 scores-kept, 0 left dense; 1 softmax left alone"),
            (
                Report((SITE, replace(SITE, outcome="dense"), replace(SITE, outcome="scores-kept")), (REFUSAL,) * 2),
                "3 sites: 1 fused, 1 scores-kept, 1 left dense; 2 softmaxes left alone",
            ),
        ],
        ids=["empty", "one", "each outcome"],
    )
    def test_ends_with_the_summary(self, report: Report, line: str) -> None:
        assert report.summary == line
        assert str(report).splitlines()[-1] == line

    def test_fits_100_columns_whatever_is_in_it(self) -> None:
        long = replace(
            SWIN, module="encoder." * 20 + "attn", reason="because " * 40, outcome="scores-kept", batch="s0*s1"
        )
        text = str(Report((long, SITE), (replace(REFUSAL, node="softmax" * 20),)))
        assert max(map(len, text.splitlines())) <= 100

    def test_brackets_of_the_model_are_not_markup(self) -> None:
        text = str(Report((replace(SWIN, score="mask[red][/red]"),), ()))
        assert "mask[red][/red]" in text

    def test_shows_score_captured_tensors_and_reasons(self) -> None:
        text = as_text(Report((SWIN,), (REFUSAL,)), width=160)
        for part in (
            "0.1768*s",
            "mask[b % 4, i, j]",
            "3×49×49, trained",
            "attention.py:98",
            REFUSAL.reason,
            "(values)",
        ):
            assert part in text

    def test_same_sites_share_a_row(self) -> None:
        text = str(Report(tuple(replace(SITE, module=f"blocks.{n}.attn") for n in range(12)), ()))
        assert "blocks.{0..11}.attn ×12" in text
        assert text.count("0.125*s") == 1

    def test_sites_that_differ_do_not_share_a_row(self) -> None:
        text = str(Report((SITE, replace(SITE, module="blocks.1.attn", topk=98)), ()))
        assert text.count("0.125*s") == 2

    def test_rich_prints_it(self) -> None:
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(Report((SITE,), ()))
        assert "blocks.0.attn" in console.export_text()


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["a.b"], "a.b"),
        ([""], "(top level)"),
        (["a.0", "a.1", "a.2"], "a.{0..2} ×3"),
        (["a.1.x", "a.3.x", "a.4.x"], "a.{1,3..4}.x ×3"),
        (["a.0", "b.0"], "a.0 … b.0 ×2"),
        (["a.0.0", "a.1.1"], "a.0.0 … a.1.1 ×2"),
        (["a.0", "a.1.x"], "a.0 … a.1.x ×2"),
        (["a", "a"], "a ×2"),
        (["layer_0.x", "layer_1.x"], "layer_{0..1}.x ×2"),
        (["layer.x", "layer.y"], "layer.x … layer.y ×2"),
    ],
    ids=str,
)
def test_label(modules: list[str], text: str) -> None:
    assert label(modules) == text


class TestCanonical:
    """What the finder read, from a report."""

    def report(self) -> Report:
        first = replace(SITE, canonical="v0: f32[2, 3] = input q")
        refusal = replace(REFUSAL, canonical="v0: f32[2, 3] = input x")
        return Report((first, replace(first, module="blocks.1.attn")), (refusal,))

    def test_rows_that_differ_in_it_alone_are_the_same(self) -> None:
        first, *_ = self.report().sites
        assert first == SITE
        assert hash(first) == hash(SITE)

    def test_of_a_path_a_pattern_and_a_row(self) -> None:
        report = self.report()
        assert report.canonical("blocks.0.attn") == (
            "# blocks.0.attn  timm/layers/attention.py:98  fused: 0.125*s\nv0: f32[2, 3] = input q"
        )
        assert report.canonical("blocks.*").count("\n\n") == 1
        assert report.canonical(report.sites[1]).startswith("# blocks.1.attn")

    def test_of_a_softmax_that_is_left_alone(self) -> None:
        assert self.report().canonical("head") == (
            "# head  net.py:7  left alone: its result is the model's output (values)\nv0: f32[2, 3] = input x"
        )

    def test_of_what_is_not_there(self) -> None:
        with pytest.raises(LookupError, match=r"no attention site 'block\.0'; .*did you mean"):
            self.report().canonical("block.0")
        with pytest.raises(LookupError, match="outside every captured graph"):
            Report((), (REFUSAL,)).canonical("head")


class TestFolding:
    """A long module path goes on in the next line after a dot."""

    @pytest.mark.parametrize(
        ("label", "lines"),
        [
            ("blocks.0.attn", ["blocks.0.attn"]),
            ("encoder.layer.11.attention.self", ["encoder.layer.", "11.attention.", "self"]),
            ("encoder.block.{0..11}.attn ×12", ["encoder.block.", "{0..11}.attn ×12"]),
            ("averylongnamewithoutanydot", ["averylongnamewithoutanydot"]),
            ("first.of.many.names … last.of.many.names", ["first.of.many.", "names … last.of.many.", "names"]),
            ("", [""]),
        ],
    )
    def test_folded(self, label: str, lines: list[str]) -> None:
        assert folded(label, 14).split("\n") == lines

    def test_in_the_table(self) -> None:
        path = "encoder.layers.encoder_layer_11.attention.self"
        report = Report((replace(SITE, module=path),), (replace(REFUSAL, module=path),))
        text = str(report).splitlines()
        starts = [line.split("  ")[0].strip() for line in text]
        assert "encoder.layers." in starts
        assert "encoder_layer_11.attention.self" in starts
        assert "encoder.layers.encoder_layer_11." in starts
        assert "attention.self" in starts
