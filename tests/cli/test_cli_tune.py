"""`kvt tune`: what it asks for, what it says without a GPU, and what it keeps of a lowering with block sizes."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_result import Result
from places import FACTORIES
from rich.console import Console
from torch import Tensor
from tuning import CANDIDATES, DEFAULT, KEY, FakeClock, speed

from kvt_compile.cli.tuning_progress import Shown
from kvt_compile.kernels import lowerings, tune
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.plain.aten import AtenLowering
from kvt_compile.kernels.tune.progress import Step
from kvt_compile.kernels.tune.tuner import process_tuner
from kvt_compile.tuning import Shape

STACK = f"{FACTORIES}:stack"


@pytest.fixture
def kvt(kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """Runs `kvt tune ARGUMENTS` in this process, with a cache folder of its own."""
    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("kvt_compile.kernels.tune.mode._requested", {})
    process_tuner.cache_clear()
    yield partial(kvt, "tune")
    process_tuner.cache_clear()


class Tuned(AtenLowering):
    """Asks the tuner at every launch, as the launcher of a generated kernel does, and computes as ever."""

    name = "tuned"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], int, str]] = []

    def _pick(self, part: str, call: AttentionCall) -> None:
        batch, heads, queries = call.rows
        self.calls.append((part, (batch, heads, queries, call.keys, call.q.shape[3]), call.topk, str(call.q.dtype)))
        shape = tune.ShapeClass.of(queries, call.keys, batch * heads, call.topk)
        key = tune.Key.on(call.q.device, kernel=tune.digest(call.spec.score), part=part, triton="", shape=shape)
        tune.pick(key, CANDIDATES, DEFAULT, speed, tune.requested(call.spec), FakeClock())

    def forward(self, call: AttentionCall) -> Any:
        self._pick("forward", call)
        return super().forward(call)

    def backward(self, call: AttentionCall, *saved: Tensor) -> Any:
        self._pick("backward", call)
        return super().backward(call, *saved)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuned]:
    """A CPU whose kernels have block sizes, taken for a GPU."""
    lowering = Tuned()
    undo = lowerings.register("c", lowering)
    command = importlib.import_module("kvt_compile.cli.tune")  # the package's attribute is the function
    monkeypatch.setattr(command, "gpu", lambda: torch.device("cpu"))
    yield lowering
    undo()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [[STACK], ["--shape", "1,2,7,7,8"]], ids=["model", "shape"])
def test_without_a_gpu_it_says_so(kvt: Callable[..., Result], arguments: list[str], tmp_path: Path) -> None:
    result = kvt(*arguments)
    assert (result.code, result.out) == (2, "")
    (sentence,) = result.err.strip().splitlines()
    assert sentence.startswith(f"kvt: torch {torch.__version__} finds no GPU here")
    assert "kvt cache import" in sentence
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either SPEC (a model) or --shape"),
        ([STACK, "--shape", "1,2,3,4,5"], "give either SPEC (a model) or --shape"),
        (["--shape", "1,2,3,4"], "'1,2,3,4' is not five sizes B,H,Nq,Nk,D"),
        (["--shape", "1,2,3,4,0"], "is not five sizes"),
        (["--shape", "1,2,3,4,x"], "is not five sizes"),
        (["--shape", "1,2,3,4,5", "--dtype", "int8"], "--dtype is one of bfloat16, float16, float32, not 'int8'"),
        (["--shape", "1,2,3,4,5", "--topk", "none"], "--shape takes one --topk"),
        (["--shape", "1,2,3,4,5", "--topk", "a=1"], "--shape takes one --topk"),
        (["--shape", "1,2,3,4,5", "--topk", "0"], "at least 1"),
        (["--shape", "1,2,3,4,5", "--batch", "3"], "--batch is about a model"),
        (["--shape", "1,2,3,4,5", "--score", "s +"], "--score: score expression 's +': cannot be read"),
        (["--shape", "1,2,3,4,5", "--score", "s + c0[b % 4, i]"], "plain coordinates"),
        (["--shape", "1,2,3,4,5", "--score", "s + c1[i, j]"], "numbered from c0 on, found c1"),
        (["--shape", "1,2,3,4,5", "--score", "c0[h]*s + c0[i]"], "c0 is indexed in two ways"),
        ([STACK, "--score", "s"], "--score goes with --shape"),
        ([STACK, "--attn", "flash"], "'flash'"),
    ],
    ids=lambda x: " ".join(x)[-30:] if isinstance(x, list) else "",
)
def test_a_mistake_is_one_sentence(kvt: Callable[..., Result], tuned: Tuned, arguments: list[str], says: str) -> None:
    result = kvt(*arguments)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert tuned.calls == []


def results(tmp_path: Path) -> dict[tuple[str, int], Any]:
    found = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "tune").glob("*/*.json")]
    return {(x["key"]["part"], x["key"]["shape"]["kept"]): x["winner"] for x in found}


@pytest.mark.parametrize("train", [False, True], ids=["forward", "with the backward"])
def test_a_shape(kvt: Callable[..., Result], tuned: Tuned, tmp_path: Path, train: bool) -> None:
    arguments = ["--shape", "2,3,9,11,8", "--dtype", "float16", "--topk", "4", "--score", "0.5*s + c0[h, i, j]"]
    result = kvt(*arguments, *(["--train"] if train else []))
    assert result.code == 0, result.err
    parts = ["forward", "backward"] if train else ["forward"]
    assert tuned.calls == [(part, (2, 3, 9, 11, 8), 4, "torch.float16") for part in parts]
    assert results(tmp_path) == {(part, 3): {"rows": 32} for part in parts}
    assert [line.startswith("kvt: tuned ") for line in result.err.splitlines()] == [True] * len(parts)
    for part in parts:
        assert f"{part} " in result.out
    assert "rows=32" in result.out
    assert str(tmp_path / "cache" / "tune") in result.out.replace("\n", "")


def test_the_second_time_there_is_nothing_to_do(kvt: Callable[..., Result], tuned: Tuned) -> None:
    assert "rows=32" in kvt("--shape", "2,3,9,11,8").out
    assert kvt("--shape", "2,3,9,11,8").out.startswith("nothing was measured")


def test_a_model(kvt: Callable[..., Result], tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what Inductor makes of the rest of the model is not the matter here
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    result = kvt(STACK, "--topk", "blocks.0=3", "--topk", "0.5", "--train")
    assert result.code == 0, result.err
    assert {part for part, *_ in tuned.calls} == {"forward", "backward"}
    assert set(results(tmp_path)) == {("forward", 3), ("forward", 4), ("backward", 3), ("backward", 4)}


def test_a_model_that_fails_is_the_users(kvt: Callable[..., Result], tuned: Tuned) -> None:
    result = kvt(f"{FACTORIES}:failing_model")
    assert result.code == 2
    assert "the model itself fails on these inputs: RuntimeError" in result.err


def test_a_person_sees_a_bar_per_kernel() -> None:
    screen = io.StringIO()
    with Shown(Console(file=screen, force_terminal=True, width=120)) as progress:
        for done in range(4):
            progress(Step(KEY, done, 4, candidate={"rows": 16}))
        progress(Step(KEY, 4, 4, winner={"rows": 32}, milliseconds=0.125))
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in text.splitlines() if "forward" in line][-1]
    assert "Nq≤224 Nk≤224" in last
    assert "4/4" in last
    assert "0.125 ms" in last


def test_the_default_score_is_scaled() -> None:
    assert Shape(1, 1, 2, 2, 64).score_text == "0.125*s"
