"""`kvt verify`: the verdict is the exit code, and a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken import wrong
from cli_result import Result
from factories import stack
from places import FACTORIES

Kvt = Callable[..., Result]
STACK = (f"{FACTORIES}:stack_with_bias", "--lowering", "aten")


def test_right_is_0(kvt: Kvt) -> None:
    result = kvt("verify", *STACK)
    assert result.code == 0, result.err
    assert "blocks.1" in result.out
    assert "OK: 2 attentions at k = N are the dense model, outputs and gradients." in result.out


def test_a_real_model(kvt: Kvt) -> None:
    result = kvt("verify", f"{FACTORIES}:vision", "--lowering", "aten", "--train")
    assert result.code == 0, result.out
    assert "in training mode, without dropout" in result.out


def test_wrong_is_1_and_the_site_is_named(kvt: Kvt, tmp_path: Path) -> None:
    with wrong("captured", factor=1.05):
        result = kvt("verify", *STACK, "--out", str(tmp_path))
        as_json = kvt("verify", *STACK, "--out", str(tmp_path), "--json", "--inference")
    assert result.code == 1
    assert "FAILED: blocks.0 at factories.py:" in result.out
    assert (tmp_path / "kvt_verify_blocks_0.py").is_file()
    assert as_json.code == 0  # the outputs are right
    assert json.loads(as_json.out)["gradients"] is False


def test_weights(kvt: Kvt, tmp_path: Path) -> None:
    torch.save(stack()[0].state_dict(), tmp_path / "weights.pt")
    result = kvt("verify", f"{FACTORIES}:stack", "--lowering", "aten", "--weights", str(tmp_path / "weights.pt"))
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"{FACTORIES}:failing_model"], "the model itself fails on these inputs"),
        ([*STACK, "--include", "layers.*"], "matches no attention site"),
        ([*STACK, "--out", "nowhere"], "--out: there is no folder 'nowhere'"),
        ([f"{FACTORIES}:stack", "--lowering", "no"], "lowering must be one of"),
        ([f"{FACTORIES}:stack", "--weights", "nowhere.pt"], "no file 'nowhere.pt'"),
    ],
    ids=["model", "pattern", "folder", "lowering", "weights"],
)
def test_mistake_is_one_sentence_and_exit_code_2(kvt: Kvt, arguments: list[str], says: str) -> None:
    result = kvt("verify", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert says in result.err.strip().splitlines()[-1]
