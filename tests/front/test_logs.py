"""What goes to the standard logger `kvt_compile`, and that TORCH_LOGS turns it on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import stack
from places import IMPORTABLE

import kvt_compile


def look() -> None:
    model, inputs = stack()
    kvt_compile.explain(model, *inputs, topk={"blocks.0": 3, "*": None})


def test_compiling_tells_every_site_refusal_and_change(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = stack()
    with caplog.at_level(logging.DEBUG, logger="kvt_compile"), torch.no_grad():
        torch.compile(model, backend="kvt", options={"topk": {"blocks.0": 3, "*": None}, "lowering": "aten"})(*inputs)
    ours = [record for record in caplog.records if record.name.startswith("kvt_compile")]
    facts = [record.kvt for record in ours if hasattr(record, "kvt")]
    assert [f["event"] for f in facts] == ["fused", "left dense", "left alone"]
    assert (facts[0]["module"], facts[0]["topk"], facts[0]["keys"]) == ("blocks.0", 3, 10)
    assert (facts[2]["step"], Path(facts[2]["file"]).name) == ("values", "factories.py")
    json.dumps(facts)
    (change,) = [record.getMessage() for record in ours if record.name == "kvt_compile.report.graphs"]
    assert change.startswith("blocks.0, ")
    assert "+ attention_default = kvt.attention(" in change
    summaries = [record.getMessage() for record in ours if record.levelno == logging.INFO]
    assert "2 attention sites, 1 rewritten, 1 refused" in summaries


def test_nothing_is_said_unless_asked(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING, logger="kvt_compile"):
        look()
    assert not [record for record in caplog.records if record.name.startswith("kvt_compile")]
    assert capsys.readouterr().out == ""


def test_torch_logs_turns_it_on() -> None:
    paths = map(str, (Path(__file__).parent, *IMPORTABLE))
    done = subprocess.run(
        [sys.executable, "-c", "from test_logs import look; look()"],
        env={**os.environ, "TORCH_LOGS": "+kvt_compile", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert "fused: blocks.0 at" in done.stderr
    assert "left alone: softmax_2" in done.stderr
    assert done.stdout == ""
