"""benchmarks/gpu_attention.py as far as it needs no GPU: which cells, what is left out when time is short, verdicts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from rich.console import Console
from tuning import FakeClock

from kvt_compile.kernels.tune.timing import WallClock

FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))

import gpu_attention  # noqa: E402
from _gpu_contestants import Contestants  # noqa: E402
from _gpu_plan import (  # noqa: E402
    COMPILED,
    EAGER,
    FLEX,
    OURS,
    SDPA,
    TOLERANT,
    Budget,
    Cell,
    Measured,
    cells,
    measure,
    targets,
)
from _gpu_table import missing, model_lines, table, write  # noqa: E402
from _vit import VisionTransformer  # noqa: E402

CELL = Cell("bfloat16", 64, 256, 128, backward=False)
SMALL = Cell("float32", 64, 24, 12, backward=True)


def costs(prepare_s: float, run_ms: float, clock: FakeClock) -> Callable[[], Callable[[], float]]:
    """A contestant that takes so long to prepare and to run."""

    def prepare() -> Callable[[], float]:
        clock.seconds += prepare_s
        return lambda: run_ms

    return prepare


def run(contestants: dict[str, Any], clock: FakeClock, budget: Budget, **options: Any) -> Measured:
    return measure(CELL, contestants, clock, budget, lambda run: 7.0, **options)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_cell_of_the_table_once_the_telling_ones_first() -> None:
    plan = cells()
    assert len(plan) == len(set(plan)) == 2 * 2 * 7 * 2 * 2
    assert [str(x) for x in plan[:2]] == ["bfloat16 D=64 N=197 k=N/2 forward", "bfloat16 D=64 N=256 k=N/2 forward"]
    assert {x.dtype for x in plan[:56]} == {"bfloat16"}
    assert all(x.batch * x.size <= 32768 < (x.batch + 1) * x.size for x in plan if x.size < 16384)
    assert all(x.heads * x.dim == 768 for x in plan)


@pytest.mark.parametrize(
    ("cell", "limit"),
    [
        (Cell("bfloat16", 64, 197, 99, False), 2.0),
        (Cell("bfloat16", 64, 256, 128, False), 2.0),
        (Cell("bfloat16", 128, 576, 72, False), 2.5),
        (Cell("bfloat16", 64, 16384, 8192, False), 2.5),
        (Cell("bfloat16", 64, 197, 99, True), 1.4),
    ],
    ids=str,
)
def test_the_bars_are_the_projects(cell: Cell, limit: float) -> None:
    bars = {target.name: target for target in targets(cell)}
    assert bars["time / sdpa"].limit == limit
    assert [bars[x].limit for x in ("eager / time", "compiled / time", "memory / sdpa")] == [10.0, 5.0, 1.1]
    assert targets(Cell("float32", 64, 197, 99, False)) == ()


def test_a_bar_is_met_at_its_limit_and_not_beyond() -> None:
    bars = {target.name: target for target in targets(CELL)}
    assert [bars["time / sdpa"].met(x) for x in (2.0, 2.01)] == [True, False]
    assert [bars["eager / time"].met(x) for x in (10.0, 9.99)] == [True, False]
    assert (bars["time / sdpa"].text(), bars["memory / sdpa"].text()) == ("≤ 2 (1.3)", "≤ 1.1")


# --- the budget -------------------------------------------------------------------------------------------------------


def test_medians_and_ratios() -> None:
    clock = FakeClock()
    given = {OURS: 2.0, TOLERANT: 1.5, SDPA: 1.0, EAGER: 30.0, COMPILED: 8.0}
    result = run({name: costs(0.0, ms, clock) for name, ms in given.items()}, clock, Budget(100.0, clock.now))
    assert result.ms == given
    assert result.ratios() == {
        "time / sdpa": 2.0, "tolerant / sdpa": 1.5, "eager / time": 15.0, "compiled / time": 4.0, "memory / sdpa": 1.0,
    }  # fmt: skip
    verdicts = {x["name"]: x["met"] for x in result.to_dict()["targets"]}
    assert verdicts == {"time / sdpa": True, "eager / time": True, "compiled / time": False, "memory / sdpa": True}


def test_a_cell_takes_its_seconds_and_slow_ones_three_turns() -> None:
    clock = FakeClock()
    run({OURS: costs(0.0, 10.0, clock)}, clock, Budget(100.0, clock.now), seconds=0.5)
    assert clock.seconds == pytest.approx(0.51)  # one warm run, then turns
    clock = FakeClock()
    run({OURS: costs(0.0, 2000.0, clock)}, clock, Budget(100.0, clock.now), seconds=0.5)
    assert len(clock.calls) == 1 + 3


def test_what_fails_is_dropped_with_its_reason_and_the_rest_is_measured() -> None:
    clock = FakeClock()

    def out_of_memory() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB\nmore")

    result = run({EAGER: out_of_memory, OURS: costs(0.0, 1.0, clock)}, clock, Budget(100.0, clock.now))
    assert result.ms == {OURS: 1.0}
    assert result.dropped == {EAGER: "OutOfMemoryError: CUDA out of memory. Tried to allocate 24 GiB"}
    assert "eager / time" not in result.ratios()


def test_compiling_has_a_share_of_the_time() -> None:
    clock = FakeClock()
    budget = Budget(100.0, clock.now, {COMPILED: 0.25})
    contestants = {OURS: costs(0.0, 1.0, clock), COMPILED: costs(10.0, 1.0, clock)}
    results = [run(contestants, clock, budget, seconds=0.0) for _ in range(4)]
    assert [COMPILED in x.ms for x in results] == [True, True, False, False]
    assert results[2].dropped == {COMPILED: "not run: its share of the time for compiling, 25 s, is spent"}
    assert all(OURS in x.ms for x in results)


def test_what_would_not_fit_any_more_is_not_begun() -> None:
    clock = FakeClock()
    budget = Budget(30.0, clock.now, {})
    contestants = {OURS: costs(0.0, 1.0, clock), EAGER: costs(18.0, 1.0, clock)}
    run(contestants, clock, budget, seconds=0.0)
    result = run(contestants, clock, budget, seconds=0.0)
    assert result.dropped == {EAGER: "not run: 12 of 30 s were left, and preparing took 18"}
    assert OURS in result.ms
    clock.seconds = 31.0
    result = run(contestants, clock, budget)
    assert result.dropped == dict.fromkeys(contestants, "not run: the 30 s of the whole run are spent")
    assert result.ms == {}


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> list[Measured]:
    first = Measured(CELL, {OURS: 1.0, TOLERANT: 0.9, SDPA: 0.4, EAGER: 20.0}, {OURS: 10.0, SDPA: 10.0}, {FLEX: "no"})
    second = Measured(Cell("float32", 64, 256, 128, True), {OURS: 1.0, SDPA: 0.4}, dropped={FLEX: "no", EAGER: "big"})
    return [first, second]


def test_table_has_the_targets_beside_the_ratios(results: list[Measured]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(results, "a title"))
    text = console.export_text()
    rows = [line for line in text.splitlines() if "N=256" in line]
    for part in ("1.000", "2.50 NO ≤ 2 (1.3)", "20.00 ok ≥ 10 (20)", "1.00 ok ≤ 1.1"):
        assert part in rows[0]
    assert "2.50 " in rows[1]
    assert "≤" not in rows[1]


def test_reasons_are_told_once(results: list[Measured]) -> None:
    assert missing(results) == [
        "flex: no (2 cells, first bfloat16 D=64 N=256 k=N/2 forward)",
        "eager: big (float32 D=64 N=256 k=N/2 fwd+bwd)",
    ]


def test_models() -> None:
    assert model_lines([{"what": "a", "ours_ms": 11.5, "dense_ms": 10.0}, {"what": "b", "dropped": "late"}]) == [
        "a: 11.50 ms, dense torch.compile 10.00 ms: 1.150 NO ≤ 1.1 (1.03)",
        "b: late",
    ]


def test_json(results: list[Measured], tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    write(path, {"gpu": "Test"}, results, [])
    data = json.loads(path.read_text())
    assert (data["gpu"], len(data["cells"])) == ("Test", 2)
    assert data["cells"][0]["ms"][OURS] == 1.0
    assert data["cells"][0]["targets"][0] == {
        "name": "time / sdpa", "limit": 2.0, "stretch": 1.3, "at_least": False, "ratio": 2.5, "met": False,
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


# --- the contestants themselves, on a CPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "fwd+bwd"])
def test_contestants_run_and_ours_is_right(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_gpu_plan.TOKENS", 48)
    cell = Cell("float32", 64, 24, 12, backward)
    clock = WallClock()
    contestants = Contestants(cell, torch.device("cpu"), clock, "aten")
    prepare = contestants.prepare()
    del prepare[COMPILED], prepare[FLEX]
    result = measure(cell, prepare, clock, Budget(60.0, clock.now), lambda run: 1.0, seconds=0.0)
    contestants.judge(result)
    assert set(result.ms) == {OURS, TOLERANT, SDPA, EAGER}, result.dropped
    assert result.notes["sdpa backend"] in ("flash", "math")
    assert result.notes["lowering"] == "aten"
    assert result.error is not None
    assert result.error < 1e-6


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    contestants = Contestants(Cell("float32", 64, 24, 12, False), torch.device("cpu"), clock, "aten")
    monkeypatch.setattr(contestants, "error", lambda: float("nan"))
    result = Measured(contestants.cell, {OURS: 1.0, TOLERANT: 1.0, SDPA: 1.0})
    contestants.judge(result)
    assert result.ms == {SDPA: 1.0}
    assert result.dropped[OURS] == "wrong: relative error nan, at most 0.0002"


def test_model_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net = VisionTransformer(width=32, depth=1, heads=2)
    before = net.head.weight.detach().clone()
    infer = gpu_attention.model_run(torch.device("cpu"), 2, False, net, net)
    assert infer().shape == (2, 1000)
    train = gpu_attention.model_run(torch.device("cpu"), 2, True, net, net)
    train()
    assert not torch.equal(net.head.weight, before)


def test_a_cell_without_room_for_its_inputs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_attention, "Contestants", no_room)
    arguments = argparse.Namespace(lowering="auto", autotune="cached", compiling=True)
    clock = FakeClock()
    result = gpu_attention.run_cell(CELL, torch.device("cpu"), clock, Budget(1.0, clock.now), arguments)
    assert result.dropped == {"inputs": "OutOfMemoryError: no room"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_and_status_2() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu_attention.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.strip().splitlines()
    assert "finds no GPU here; run it on a machine that has one" in sentence
