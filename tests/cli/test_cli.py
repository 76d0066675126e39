"""`kvt` on the command line: what it prints, and that a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_result import Result
from places import FACTORIES, TESTS

import kvt_compile
from kvt_compile.cli import main
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.spec import load
from kvt_compile.cli.subject import Subject, Wanted
from kvt_compile.cli.topk import parse_topk
from kvt_compile.report.report import Report

STACK = f"{FACTORIES}:stack"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any], bool, bool]]:
    """Stands in for kvt_compile.explain and notes what it was asked: args, keywords, training mode, gradients."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], bool, bool]] = []

    def explain(model: torch.nn.Module, *args: Any, **keywords: Any) -> Report:
        calls.append((args, keywords, model.training, torch.is_grad_enabled()))
        return Report((), ())

    monkeypatch.setattr(kvt_compile, "explain", explain)
    return calls


class TestExplain:
    """With the real kvt_compile.explain."""

    def test_table_names_every_attention_and_every_other_softmax(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", STACK, "--topk", "0.5")
        assert result.code == 0, result.err
        assert "blocks.{0..1} ×2" in result.out
        assert result.out.splitlines()[-1] == "2 sites: 2 fused, 0 scores-kept, 0 left dense; 1 softmax left alone"

    def test_page_picture_and_diff(self, kvt: Callable[..., Result], tmp_path: Path) -> None:
        files = ["--html", str(tmp_path / "out.html"), "--graph", str(tmp_path / "out.svg")]
        result = kvt("explain", STACK, "--diff", "--topk", "blocks.0=3", *files)
        assert result.code == 0, result.err
        assert result.out.startswith("@@ blocks.0  ")
        assert sum(line.startswith("+ ") for line in result.out.splitlines()) == 3
        assert f"<h1>{STACK}</h1>" in (tmp_path / "out.html").read_text()
        assert (tmp_path / "out.svg").read_text().startswith("<svg ")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.svg"]

    def test_the_values_that_were_read_at_a_site(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", STACK, "--canonical", "blocks.*")
        assert result.code == 0, result.err
        head, *values = result.out.split("\n\n")[1].splitlines()
        assert head.startswith("# blocks.1  ")
        assert "fused: " in head
        assert values[0].startswith("v0: f32[")
        assert sum(" = contraction(" in line for line in values) == 2

    def test_the_values_of_no_site(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", STACK, "--canonical", "blocks.7")
        assert result.code == 2
        assert "--canonical: no attention site 'blocks.7'; there are 'blocks.0'" in result.err

    def test_diff_of_a_model_that_stays_as_it_is(self, kvt: Callable[..., Result]) -> None:
        assert "the graph stays as it is" in kvt("explain", STACK, "--diff", "--topk", "none").out

    def test_json_carries_what_a_program_needs(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", f"{FACTORIES}:stack_with_bias", "--topk", "3", "--json")
        assert result.code == 0, result.err
        data = json.loads(result.out)
        site = data["sites"][1]
        sizes = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")
        assert [site[name] for name in sizes] == [2, 2, 2, 10, 10, 8, 8]
        assert (site["module"], site["outcome"], site["topk"]) == ("blocks.1", "fused", 3)
        assert (site["dtype"], site["axis"]) == ("float32", "token")
        assert site["location"].partition(":")[0].endswith("factories.py")
        assert "s" in site["score"]
        assert [tensor["shape"] for tensor in site["captured"]] == [[2, 10, 10]]
        assert site["lowering"]
        (refusal,) = data["refusals"]
        assert refusal["node"]
        assert refusal["reason"]
        assert data["spec"].endswith(":stack_with_bias")

    def test_k_that_keeps_every_key_leaves_sites_dense(self, kvt: Callable[..., Result]) -> None:
        sites = json.loads(kvt("explain", STACK, "--topk", "10", "--json").out)["sites"]
        assert [site["outcome"] for site in sites] == ["dense", "dense"]
        assert all(site["reason"] for site in sites)

    def test_unless_forced(self, kvt: Callable[..., Result]) -> None:
        sites = json.loads(kvt("explain", STACK, "--topk", "10", "--force-rewrite", "--json").out)["sites"]
        assert [site["outcome"] for site in sites] == ["fused", "fused"]

    def test_pattern_keeps_the_rest_at_the_plain_value(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", STACK, "--topk", "blocks.0=3", "--topk", "0.5", "--json")
        assert [site["topk"] for site in json.loads(result.out)["sites"]] == [3, 5]

    def test_exclude(self, kvt: Callable[..., Result]) -> None:
        sites = json.loads(kvt("explain", STACK, "--exclude", "blocks.0", "--json").out)["sites"]
        assert [site["outcome"] for site in sites] == ["dense", "fused"]

    def test_source_of_a_site(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", f"{FACTORIES}:stack_with_bias", "--source", "blocks.0", "--lowering", "c")
        assert result.code == 0, result.err
        assert result.out.startswith("// blocks.0  ")
        assert "#include <math.h>" in result.out

    @pytest.mark.parametrize(
        ("target", "line"), [("cpu", "#include <math.h>"), ("sm_90", "# for sm_90, 10 queries and 10 keys:")]
    )
    def test_source_for_a_machine_that_is_not_here(self, kvt: Callable[..., Result], target: str, line: str) -> None:
        result = kvt("explain", f"{FACTORIES}:stack_with_bias", "--source", "blocks.0", "--target", target)
        assert result.code == 0, result.err
        assert line in result.out.splitlines()
        assert ("def backward_kv(" in result.out) == (target != "cpu")

    def test_sites_that_share_their_code(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", STACK, "--source", "blocks.*", "--lowering", "c")
        assert [line[:11] for line in result.out.splitlines()[:2]] == ["// blocks.0", "// blocks.1"]

    def test_timm_by_name(self, kvt: Callable[..., Result]) -> None:
        result = kvt("explain", "timm:vit_tiny_patch16_224", "--image-size", "32", "--batch", "2", "--json")
        assert result.code == 0, result.err
        data = json.loads(result.out)
        assert data["summary"]["sites"] == data["summary"]["fused"] == 12
        assert (data["sites"][0]["batch"], data["sites"][0]["queries"]) == (2, 5)

    def test_runs_as_a_module(self) -> None:
        command = [sys.executable, "-m", "kvt_compile.cli", "explain", STACK]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "2 fused" in done.stdout


class TestArguments:
    """What the verb hands to kvt_compile.explain."""

    def test_defaults(self, kvt: Callable[..., Result], asked: list[Any]) -> None:
        assert kvt("explain", STACK).code == 0
        ((args, keywords, training, grad),) = asked
        assert [tuple(arg.shape) for arg in args] == [(2, 10, 16)]
        assert keywords == {"topk": 0.5, "force_rewrite": False, "lowering": "auto"}
        assert (training, grad) == (False, False)

    def test_all(self, kvt: Callable[..., Result], asked: list[Any]) -> None:
        options = "--topk a=1 --topk none --include a --include b --exclude c --force-rewrite --lowering aten --train"
        assert kvt("explain", f"{FACTORIES}:stack_with_bias", *options.split()).code == 0
        ((_, keywords, training, grad),) = asked
        assert keywords.pop("bias").shape == (2, 10, 10)
        assert keywords == {
            "topk": {"a": 1, "*": None},
            "include": ("a", "b"),
            "exclude": ("c",),
            "force_rewrite": True,
            "lowering": "aten",
        }
        assert (training, grad) == (True, True)

    def test_what_a_model_prints_stays_out_of_the_json(self, kvt: Callable[..., Result], asked: list[Any]) -> None:
        result = kvt("explain", f"{FACTORIES}:chatty", "--json")
        assert json.loads(result.out)["options"]["topk"] == 0.5
        assert "building" in result.err

    def test_preload_runs_first(
        self, kvt: Callable[..., Result], asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "first.py").write_text("import sys\nsys.kvt_test_preloaded = True\n")
        spec = tmp_path / "net.py"
        spec.write_text(
            f"import sys\nassert sys.kvt_test_preloaded\nsys.path.append({str(TESTS)!r})\nfrom factories import stack\n"
        )
        try:
            assert kvt("explain", f"{spec}:stack", "--preload", str(tmp_path / "first.py")).code == 0
            del sys.kvt_test_preloaded  # type: ignore[attr-defined]
            monkeypatch.setenv("KVT_PRELOAD", str(tmp_path / "first.py"))
            assert kvt("explain", f"{spec}:stack").code == 0
        finally:
            vars(sys).pop("kvt_test_preloaded", None)


MISTAKES = [
    ("no kind", ["vit"], "is not timm:NAME"),
    ("unknown kind", ["tim:vit"], "did you mean 'timm'?"),
    ("no name", ["timm:"], "is not timm:NAME"),
    ("timm name", ["timm:vit_tiny_patch16_22"], "did you mean 'vit_tiny_patch16_224'"),
    ("torchvision name", ["torchvision:vit_b_17"], "'vit_b_16'"),
    ("transformers name", ["transformers:berd"], "'bert'"),
    ("image size", ["torchvision:vit_b_16", "--image-size", "30"], "vit_b_16 cannot be built"),
    ("torchvision attn", ["torchvision:vit_b_16", "--attn", "eager"], "--attn"),
    ("attn", [STACK, "--attn", "flash"], "'flash'"),
    ("missing file", ["nowhere.py:model"], "there is no file 'nowhere.py'"),
    ("missing factory", [f"{FACTORIES}:stak"], "did you mean 'stack'"),
    ("not a function", [f"{FACTORIES}:not_a_function"], "defines no function"),
    ("factory raises", [f"{FACTORIES}:raising"], "raising() fails at line"),
    ("wrong return", [f"{FACTORIES}:only_a_model"], "returned Stack; expected (model, args)"),
    ("batch of a factory", [STACK, "--batch", "2"], "decides its own"),
    ("model fails", [f"{FACTORIES}:failing_model"], "the model itself fails on these inputs: RuntimeError"),
    ("topk zero", [STACK, "--topk", "0"], "at least 1"),
    ("topk negative", [STACK, "--topk=-3"], "at least 1"),
    ("topk ratio", [STACK, "--topk", "1.5"], "(0, 1]"),
    ("topk word", [STACK, "--topk", "half"], "'half' is not a count"),
    ("topk nan", [STACK, "--topk", "nan"], "(0, 1]"),
    ("topk twice", [STACK, "--topk", "1", "--topk", "2"], "2 plain values"),
    ("topk of a pattern", [STACK, "--topk", "blocks.0=0"], "at least 1"),
    ("preload", [STACK, "--preload", "nowhere.py"], "--preload: there is no file"),
    ("lowering", [STACK, "--lowering", "atenn"], "'aten'"),
    ("html in a missing folder", [STACK, "--html", "nowhere/out.html"], "there is no folder 'nowhere'"),
    ("graph in a missing folder", [STACK, "--graph", "nowhere/out.svg"], "there is no folder 'nowhere'"),
    ("html over a folder", [STACK, "--html", str(TESTS)], "it is a folder"),
    ("two things to print", [STACK, "--diff", "--json"], "--json and --diff each print something else"),
    ("source of no site", [STACK, "--source", "block.0"], "there are 'blocks.0', 'blocks.1'; did you mean 'blocks.0'?"),
    ("source of two kernels", [f"{FACTORIES}:two_sizes", "--source", "*"], "name one of them: 'small', 'large'"),
    ("source of a dense site", [STACK, "--topk", "10", "--source", "blocks.0"], "is left dense"),
    ("source of none", [STACK, "--lowering", "aten", "--source", "blocks.0"], "calls torch's operators"),
    ("target", [STACK, "--source", "blocks.0", "--target", "sm_91"], "'sm_91', expected one of cpu, sm_80"),
    ("target without source", [STACK, "--target", "sm_90"], "--target goes with --source"),
    ("source and json", [STACK, "--json", "--source", "blocks.0"], "give one of them"),
]


@pytest.mark.parametrize(("arguments", "says"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_mistake_is_one_sentence_and_exit_code_2(kvt: Callable[..., Result], arguments: list[str], says: str) -> None:
    result = kvt("explain", *arguments)
    assert result.code == 2
    assert result.out == ""
    (sentence,) = result.err.strip().splitlines()
    assert sentence.startswith("kvt: ")
    assert says in sentence


@pytest.mark.parametrize(
    ("text", "line"), [("import nonexistent_thing", 1), ("x = 1\ny = x +", 2), ("\n\nraise OSError('no')", 3)], ids=str
)
def test_broken_file_is_named_with_its_line(kvt: Callable[..., Result], tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "net.py").write_text(text)
    result = kvt("explain", f"{tmp_path}/net.py:model")
    assert result.code == 2
    assert f"net.py fails at line {line}: " in result.err


@pytest.mark.parametrize("arguments", [["explain"], ["explain", STACK, "--nonsense"], ["explane", STACK]], ids=str)
def test_wrong_usage(kvt: Callable[..., Result], arguments: list[str]) -> None:
    result = kvt(*arguments)
    assert result.code == 2
    assert "Usage" in result.err
    assert "Traceback" not in result.err


def test_bug_of_ours_is_not_hidden(kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*_: Any, **__: Any) -> Report:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(kvt_compile, "explain", explain)
    with pytest.raises(ZeroDivisionError):
        main(["explain", STACK])


def test_version(kvt: Callable[..., Result]) -> None:
    result = kvt("--version")
    assert (result.code, result.out) == (0, f"kvt 0.1.0 (torch {metadata.version('torch')})\n")


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["100"], 100),
        (["1"], 1),
        (["0.5"], 0.5),
        (["1.0"], 1.0),
        (["none"], None),
        (["a.*=3"], {"a.*": 3}),
        (["a.*=3", "b=none", "0.25"], {"a.*": 3, "b": None, "*": 0.25}),
    ],
    ids=str,
)
def test_topk_text(texts: list[str], value: Any) -> None:
    parsed = parse_topk(texts)
    assert parsed == value
    assert type(parsed) is type(value)


def run(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.eval()(*subject.args, **subject.kwargs)


@pytest.mark.parametrize(
    "spec",
    [
        "timm:swin_tiny_patch4_window7_224",
        "torchvision:vit_b_16",
        "torchvision:mvit_v1_b",
        "transformers:vit",
        "transformers:distilbert",
        "transformers:clip",
        "transformers:whisper",
        "transformers:audio-spectrogram-transformer",
    ],
    ids=str,
)
def test_named_model_runs_on_the_inputs_made_for_it(spec: str) -> None:
    run(load(spec, Wanted()))


def test_same_weights_and_inputs_every_time() -> None:
    first, second = (load("timm:vit_tiny_patch16_224", Wanted(batch=2, image_size=64)) for _ in range(2))
    assert torch.equal(first.args[0], second.args[0])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert first.args[0].shape == (2, 3, 64, 64)
    run(first)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_chosen_and_the_switch_put_back(attention: Any) -> None:
    import timm

    before = timm.layers.use_fused_attn()
    model = load("timm:vit_tiny_patch16_224", Wanted(attention=attention)).model
    assert model.blocks[0].attn.fused_attn == (attention == "sdpa")  # type: ignore[union-attr, index]
    assert timm.layers.use_fused_attn() == before
    model = load("transformers:distilbert", Wanted(attention=attention)).model
    assert model.config._attn_implementation == attention  # type: ignore[union-attr]


def test_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm"):
        load("timm:vit_tiny_patch16_224", Wanted())


def test_torchvision_of_another_torch_is_explained(tmp_path: Path) -> None:
    """A fresh process whose torchvision fails as PyPI's does beside a CPU-only torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = "from kvt_compile.cli import main; main(['explain', 'torchvision:vit_b_16'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 2
    assert "--preload" in done.stderr
    assert "Traceback" not in done.stderr
