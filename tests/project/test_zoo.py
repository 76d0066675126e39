"""A small, fast cut of the zoo (benchmarks/zoo): real models, few layers, small images, judged as `make zoo` does.

Found: exactly the true sites.  Kept: k = N equals dense by float64's measure, and a single key does not.
"""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo import ROOT, catalogue, elsewhere
from benchmarks.zoo.__main__ import with_earlier_checks
from benchmarks.zoo.catalogue import Entry, entries, unfold
from benchmarks.zoo.judge import Verdict, judge
from benchmarks.zoo.pool import each_in_a_process
from benchmarks.zoo.table import judged_before, page
from benchmarks.zoo.tally import unmatched


def model(name: str, attention: str, *token: str, deep: bool = False, **more: Any) -> Entry:
    """A timm or transformers entry; `token` are the module paths of its true sites, folded."""
    library = "timm" if "image" in more else "transformers"
    channel, others = more.pop("channel", []), more.pop("others", [])
    sites = {"token": unfold(list(token))} | ({"channel": unfold(channel)} if channel else {})
    settings, image = more.pop("settings", {}), more.pop("image", None)
    return Entry(
        library, name, attention, name, 2, image, sites, unfold(others), gradients=deep, settings=settings, **more
    )


SWIN = {"depths": (2,), "num_heads": (3,), "embed_dim": 24}
CUT: list[tuple[Entry, int]] = [  # entry, and how many of its sites are scores-kept
    (model("vit_tiny_patch16_224", "eager", "blocks.{0..1}.attn", image=64, settings={"depth": 2}, deep=True), 0),
    (model("vit_tiny_patch16_224", "sdpa", "blocks.{0..1}.attn", image=64, settings={"depth": 2}), 0),
    # relative position bias from a table, shifted windows
    (model("swin_tiny_patch4_window7_224", "eager", "layers.0.blocks.{0..1}.attn", image=56, settings=SWIN,
           deep=True), 0),
    # a bias added to a slice of the scores in place, pooled keys
    (
        model(
            "mvitv2_tiny", "eager", "stages.0.blocks.0.attn", "stages.1.blocks.{0..1}.attn",
            "stages.2.blocks.{0..4}.attn", "stages.3.blocks.{0..1}.attn", image=64,
        ),
        0,
    ),
    # talking heads, and a class token that attends
    (
        model(
            "cait_xxs24_224", "eager", "blocks.{0..1}.attn", "blocks_token_only.0.attn", image=64, deep=True,
            settings={"depth": 2, "depth_token_only": 1, "embed_dim": 48},
        ),
        2,
    ),
    # a second, positional softmax mixed in and renormalised in place
    (
        model(
            "convit_tiny", "eager", "blocks.{0..1}.attn", others=["blocks.0.attn"], image=64, deep=True,
            settings={"depth": 2, "local_up_to_layer": 1, "embed_dim": 48},
        ),
        0,
    ),
    (model("beit_base_patch16_224", "eager", "blocks.0.attn", image=64,
           settings={"depth": 1, "embed_dim": 48, "num_heads": 4}), 0),
    # a difference of two softmaxes: one softmax over doubled heads when written out, two calls when fused
    (model("vit_dwee_patch16_reg1_gap_256", "eager", "blocks.0.attn", image=64, settings={"depth": 1}, deep=True), 0),
    (model("vit_dwee_patch16_reg1_gap_256", "sdpa", "blocks.0.attn *2", image=64, settings={"depth": 1}), 0),
    (model("test_maxvit", "eager", *(f"stages.{n}.blocks.0.{part}" for n in range(4)
                                     for part in ("attn_block.attn", "attn_grid.attn")), image=64), 0),
    (model("pvt_v2_b0", "sdpa", *(f"stages.{n}.blocks.{{0..1}}.attn" for n in range(4)), image=64), 0),
    # attention over channels is left dense, the class token's is over tokens
    (
        model(
            "xcit_nano_12_p16_224", "eager", "cls_attn_blocks.{0..1}.attn", channel=["blocks.0.attn"], image=64,
            settings={"depth": 1, "embed_dim": 48},
        ),
        0,
    ),
    # not attention: softmax over the keys alone; outlook attention, whose weights a linear layer makes
    (model("coat_lite_tiny", "eager", image=64, others=[f"serial_blocks{s}.{n}.factoratt_crpe" for s in range(1, 5)
                                                        for n in range(2)]), 0),
    (model("volo_d1_224", "eager", *(f"network.{s}.{{0..{n}}}.attn" for s, n in ((2, 3), (3, 7), (4, 1))),
           "post_network.{0..1}.attn", image=64, others=["network.0.{0..3}.attn"]), 0),
    (model("vit", "sdpa", "layers.{0..1}.attention"), 0),
    (model("bert", "eager", "encoder.layer.{0..1}.attention.self", deep=True), 0),
    (model("llama", "sdpa", "layers.{0..1}.self_attn"), 0),
    (model("swin", "eager", *(f"encoder.layers.{s}.blocks.{{0..1}}.attention.self" for s in range(2))), 0),
    (model("sam_vision", "eager", "vision_encoder.layers.{0..1}.attn"), 0),
    # a sink column; and the router's softmaxes, which are none
    (model("gpt_oss", "eager", "layers.{0..1}.self_attn", others=["layers.{0..1}.mlp.router"], deep=True), 2),
    # three products of queries and keys
    (model("deberta_v2", "eager", "encoder.layer.{0..1}.attention.self"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "kept"), [pytest.param(*case, id=case[0].id) for case in CUT])
def test_every_site_is_found_and_keeps_its_meaning(entry: Entry, kept: int) -> None:
    verdict = judge(entry)
    assert verdict.problems == []
    assert (verdict.fused, verdict.kept) == (len(entry.sites["token"]) - kept, kept)
    assert verdict.dense == len(entry.sites.get("channel", []))
    assert len(verdict.refused) == len(entry.others)
    assert all(reason for _, reason in verdict.refused)


def test_expected_sites_cover_every_model_file_with_attention() -> None:
    import timm.models

    known = {entry.family for entry in entries("timm/*")}
    folder = Path(timm.models.__file__).parent
    texts = {file.stem: file.read_text() for file in folder.glob("[!_]*.py")}
    files = {name for name, text in texts.items() if "softmax(" in text and "def forward" in text}
    assert files - known == set()


def test_expected_sites_survive_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries()
    monkeypatch.setattr(catalogue, "FILE", tmp_path / "expected.json")
    catalogue.save(before)
    assert entries() == before


@pytest.mark.parametrize(
    ("found", "missed", "false"),
    [
        ([("token", "a.softmax"), ("token", "b")], [], []),
        ([("token", "a")], [("token", "b")], []),
        ([("token", "a"), ("channel", "b")], [("token", "b")], [("channel", "b")]),
        ([("token", "a"), ("token", "b"), ("token", "ab")], [], [("token", "ab")]),
    ],
    ids=["softmax-module", "missed", "wrong-axis", "one-too-many"],
)
def test_found_is_paired_with_true(found: Any, missed: Any, false: Any) -> None:
    assert unmatched([("token", "a"), ("token", "b")], found, shared=False) == (missed, false)


def test_shared_graphs_are_paired_by_axis() -> None:
    true, found = [("token", "layers.0"), ("token", "layers.1")], [("token", "layers.0"), ("token", "layers.0")]
    assert unmatched(true, found, shared=True) == ([], [])
    assert unmatched(true, found, shared=False) == ([("token", "layers.1")], [("token", "layers.0")])


def test_what_hangs_or_dies_costs_only_itself() -> None:
    import os

    def work(number: int, result: dict[str, Any]) -> None:
        result["number"] = number
        if number == 1:
            time.sleep(60)
        if number == 2:
            os._exit(3)
        if number == 3:
            raise ValueError("broken")

    results = dict(each_in_a_process(work, range(5), jobs=5, timeout=3.0))
    assert results[0] == {"number": 0}
    assert results[4] == {"number": 4}
    assert "took more than 3 s" in results[1]["failure"]
    assert "status 3" in results[2]["failure"]
    assert results[3]["failure"] == "ValueError: broken"
    assert results[3]["number"] == 3


def test_page_shows_what_went_wrong() -> None:
    entry = CUT[0][0]
    text = page([(entry, Verdict(entry.id, fused=1, missed=["blocks.1.attn (token)"]))])
    assert f"- `{entry.id}`: missed blocks.1.attn (token)" in text
    assert "## Problems" not in page([(entry, Verdict(entry.id, fused=2))])


def test_documentation_shows_every_model() -> None:
    text = (ROOT / "docs" / "zoo.md").read_text()
    assert "## Problems" not in text
    for entry in entries():
        name = entry.id if entry.count or entry.others else entry.id.partition("/")[2]
        assert name in text, f"{entry.id}: run `make zoo`"


def test_libraries_the_project_was_not_made_for() -> None:
    """At least 40 models of 20 other packages, each with a maker and a pinned version, in a part of the page."""
    others = [entry for entry in entries() if entry.library in elsewhere.packages()]
    assert {(entry.library, entry.name) for entry in others} == set(elsewhere.MODELS)
    assert len(others) >= 40
    assert len(elsewhere.packages()) >= 20
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = project["optional-dependencies"]["elsewhere"]
    assert len(pinned) == len(elsewhere.packages())
    assert all("==" in line for line in pinned)
    text = page([(entry, Verdict(entry.id)) for entry in (CUT[0][0], others[0])])
    assert f"## Libraries the project was not made for\n\n1 packages. {others[0].count} true sites" in text


def test_a_shallow_verdict_keeps_what_was_found_of_gradients() -> None:
    checks = {"gradients": {"error": 0.0, "budget": 1.0}, "k = N": {"error": 0.5, "budget": 1.0}}
    before = {"fused": 2, "checks": checks}
    record = {"deep": False, "fused": 2, "checks": {"k = N": {"error": 0.1, "budget": 1.0}}}
    assert with_earlier_checks(record, before)["checks"] == checks | record["checks"]
    for changed, earlier in (({"deep": True}, before), ({"fused": 1}, before), ({}, None)):
        assert with_earlier_checks(record | changed, earlier)["checks"] == record["checks"]


def test_a_package_that_is_missing_is_said_and_keeps_its_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "find_spec", lambda name: None)
    assert elsewhere.is_here("timm")
    assert not any(map(elsewhere.is_here, elsewhere.packages()))
    (library,) = {entry.library for entry in entries("vit_pytorch/*")}
    before = judged_before([library])
    assert before.keys() == {entry.id for entry in entries("vit_pytorch/*")}
