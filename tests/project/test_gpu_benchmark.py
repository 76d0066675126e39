"""What `make gpu` measures, as far as that needs no GPU: which cells, what is left out when time is short, who is
judged before being timed, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning import FakeClock

from benchmarks._vit import VisionTransformer
from benchmarks.gpu import correct, profiling, report, speed
from benchmarks.gpu.bars import BARS, MODEL, bars_of
from benchmarks.gpu.cells import COMPILED, EAGER, FLEX, OURS, QUICK, SDPA, SLOW, TOLERANT, Cell, Race, races
from benchmarks.gpu.contestants import Contestants, neighbours
from benchmarks.gpu.correct import CHECKS, Check, judge
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.model import model_run
from benchmarks.gpu.place import Place
from benchmarks.gpu.plan import Budget, Measured, measure
from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.tune.timing import WallClock

CELL = Cell("bfloat16", 64, 256, 128, backward=False)
SMALL = Cell("float32", 64, 24, 12, backward=True)
CPU = torch.device("cpu")
HERE = Place(CPU, WallClock())


def costs(prepare_s: float, run_ms: float, clock: FakeClock) -> Callable[[], Callable[[], float]]:
    """A contestant that takes so long to prepare and to run."""

    def prepare() -> Callable[[], float]:
        clock.seconds += prepare_s
        return lambda: run_ms

    return prepare


def run(contestants: dict[str, Any], clock: FakeClock, budget: Budget, **options: Any) -> Measured:
    return measure(CELL, contestants, clock, budget, lambda run: 7.0, **options)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_telling_races_come_first_and_none_twice() -> None:
    plan = races()
    assert len(plan) == len(set(plan))
    assert [str(x.cell) for x in plan[:3]] == [
        "bfloat16 D=64 N=197 k=N/2 forward", "bfloat16 D=64 N=197 k=N/2 fwd+bwd", "bfloat16 D=64 N=1024 k=N/2 forward",
    ]  # fmt: skip
    assert {x.contestants for x in plan[:6]} == {QUICK}
    assert {x.contestants for x in plan[6:12]} == {SLOW}
    assert [x.cell for x in plan[:6]] == [x.cell for x in plan[6:12]]
    assert [str(x.cell) for x in plan[12:14]] == [
        f"bfloat16 D=64 N=4096 window(13) at 64x64 {what}" for what in ("forward", "fwd+bwd")
    ]
    assert {x.cell.dtype for x in plan[14:20]} == {"float32"}
    assert all(x.cell.batch * x.cell.size <= 32768 < (x.cell.batch + 1) * x.cell.size for x in plan)
    assert all(x.cell.heads * x.cell.dim == 768 for x in plan)


def test_every_bar_of_attention_is_about_cells_that_are_raced_early() -> None:
    early = [race for race in races()[: speed.DRY_RACES]]
    for bar in BARS:
        ours = [race for race in early if bar.of(race.cell)]
        assert bool(ours) == (bar.ratio != MODEL), bar.name


@pytest.mark.parametrize(
    ("cell", "must"),
    [
        (Cell("bfloat16", 64, 197, 99, False), {"time / sdpa": 2.0, "eager / time": 10.0, "compiled / time": 5.0}),
        (Cell("bfloat16", 64, 256, 128, False), {"time / sdpa": 2.0, "eager / time": 10.0, "compiled / time": 5.0}),
        (Cell("bfloat16", 64, 257, 129, False), {"time / sdpa": 2.5, "eager / time": 10.0, "compiled / time": 5.0}),
        (Cell("bfloat16", 64, 197, 99, True), {"time / sdpa": 1.4}),
        (Cell("bfloat16", 64, 197, 25, False), {}),
        (Cell("bfloat16", 128, 576, 288, False), {}),
        (Cell("float32", 64, 197, 99, False), {}),
    ],
    ids=str,
)
def test_the_bars_are_the_projects(cell: Cell, must: dict[str, float]) -> None:
    found = {bar.ratio: bar.must for bar in bars_of(cell)}
    assert found == (must | {"memory / sdpa": 1.1} if must else {})


def test_a_bar_is_met_at_its_limit_and_not_beyond() -> None:
    bars = {bar.ratio: bar for bar in bars_of(CELL)}
    assert [bars["time / sdpa"].met(x) for x in (2.0, 2.01)] == [True, False]
    assert [bars["eager / time"].met(x) for x in (10.0, 9.99)] == [True, False]
    assert (bars["time / sdpa"].text(), bars["memory / sdpa"].text()) == ("≤ 2 (1.3)", "≤ 1.1")


# --- the budget -------------------------------------------------------------------------------------------------------


def test_medians_and_ratios() -> None:
    clock = FakeClock()
    given = {OURS: 2.0, TOLERANT: 1.5, SDPA: 1.0, EAGER: 30.0, COMPILED: 8.0}
    result = run({name: costs(0.0, ms, clock) for name, ms in given.items()}, clock, Budget(100.0, clock.now))
    assert result.ms == given
    found = result.to_dict()
    assert found["ratios"] == {
        "time / sdpa": 2.0, "tolerant / sdpa": 1.5, "eager / time": 15.0, "compiled / time": 4.0, "memory / sdpa": 1.0,
    }  # fmt: skip
    assert [x["met"] for x in found["bars"]] == [True, True, False, True]


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
    assert "eager / time" not in result.to_dict()["ratios"]


def test_compiling_has_a_share_of_the_time() -> None:
    clock = FakeClock()
    budget = Budget(100.0, clock.now, {COMPILED: 0.25})
    contestants = {OURS: costs(0.0, 1.0, clock), COMPILED: costs(10.0, 1.0, clock)}
    results = [run(contestants, clock, budget, seconds=0.0) for _ in range(4)]
    assert [COMPILED in x.ms for x in results] == [True, True, False, False]
    assert results[2].dropped == {COMPILED: "not run: its share of the time for compiling, 25 s, is spent"}
    assert all(OURS in x.ms for x in results)
    assert [speed.finished(x.to_dict()) for x in results] == [True, True, False, False]


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


# --- the contestants themselves, on a CPU -----------------------------------------------------------------------------


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.cells.TOKENS", 48)


@contextmanager
def changed(forward: Callable[[Tensor], Tensor] = lambda x: x, dv: float = 1.0) -> Iterator[str]:
    """A lowering whose outputs or gradients are not what they should be."""

    class Changed(aten.AtenLowering):
        def forward(self, call: Any) -> Any:
            out, *rest = super().forward(call)
            return forward(out), *rest

        def backward(self, call: Any, *saved: Tensor) -> Any:
            dq, dk, gradient, rest = super().backward(call, *saved)
            return dq, dk, None if gradient is None else gradient * dv, rest

    undo = lowerings.register("changed", Changed())
    try:
        yield "changed"
    finally:
        undo()


def raced(cell: Cell, lowering: str) -> tuple[Measured, Contestants]:
    clock = WallClock()
    contestants = Contestants(cell, CPU, clock, lowering)
    prepare = contestants.prepare()
    del prepare[COMPILED], prepare[FLEX]
    return measure(cell, prepare, clock, Budget(60.0, clock.now), lambda run: 1.0, seconds=0.0), contestants


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "fwd+bwd"])
def test_contestants_run_and_ours_is_right(backward: bool) -> None:
    result, contestants = raced(Cell("float32", 64, 24, 12, backward), "aten")
    assert set(result.ms) == {OURS, TOLERANT, SDPA, EAGER}, result.dropped
    assert contestants.backend in ("flash", "math")
    assert contestants.lowering_name() == "aten"
    assert set(contestants.errors) == ({"out", "dq", "dk", "dv"} if backward else {"out"})
    assert max(contestants.errors.values()) < 1e-6


@pytest.mark.usefixtures("few_tokens")
def test_a_window_is_judged_by_its_map() -> None:
    result, contestants = raced(Cell("float32", 64, 25, 25, True, window=3), "aten")
    assert {OURS, SDPA} <= set(result.ms), result.dropped
    assert max(contestants.errors.values()) < 1e-6
    assert contestants.spec.select == "window(3)"
    selection = selection_of("window(3)", (5, 5), 0, 25, 25)
    assert selection is not None
    i, j = torch.meshgrid(torch.arange(25), torch.arange(25), indexing="ij")
    assert torch.equal(neighbours(5, 3)(i, i, i, j), selection.map(1, (i, i, i, j), {}))


@pytest.mark.usefixtures("few_tokens")
def test_a_wrong_backward_has_no_time() -> None:
    with changed(dv=1.001) as name:
        result, _ = raced(SMALL, name)
        assert set(result.ms) == {SDPA, EAGER}
        assert result.dropped[OURS] == "wrong: relative error 1.0e-03 of dv, at most 0.0002"
        assert TOLERANT in result.dropped
        forward, _ = raced(Cell("float32", 64, 24, 12, False), name)
        assert OURS in forward.ms


@pytest.mark.usefixtures("few_tokens")
def test_a_wrong_output_has_no_time_nor_has_one_that_is_nan() -> None:
    for wrong, said in ((lambda x: x * 1.001, "1.0e-03"), (lambda x: x * torch.nan, "nan")):
        with changed(wrong) as name:
            result, _ = raced(SMALL, name)
            assert result.dropped[OURS] == f"wrong: relative error {said} of out, at most 0.0002"


@pytest.mark.usefixtures("few_tokens")
def test_errors_of_the_last_head_are_seen() -> None:
    """Where offsets overflow first."""

    def last_only(x: Tensor) -> Tensor:
        x = x.clone()
        x[-1, -1] = 0
        return x

    with changed(last_only) as name:
        assert OURS in raced(SMALL, name)[0].dropped


def test_model_steps_run() -> None:
    net = VisionTransformer(width=32, depth=1, heads=2)
    before = net.head.weight.detach().clone()
    assert model_run(CPU, 2, False, net, net)().shape == (2, 1000)  # type: ignore[attr-defined]
    model_run(CPU, 2, True, net, net)()
    assert not torch.equal(net.head.weight, before)


def test_a_cell_without_room_for_its_inputs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(speed, "Contestants", no_room)
    stubbed = Place(CPU, WallClock(), stub=object())
    result = speed.run_race(Race(CELL, QUICK), stubbed, Budget(1.0, FakeClock().now))
    assert result.dropped == {"inputs": "OutOfMemoryError: no room"}


# --- right or wrong, on a CPU -----------------------------------------------------------------------------------------

FEW = (
    Check("plain", torch.float32, 40, 16, 12, batch=2),
    Check("bias", torch.float32, 40, 16, 12, score="0.25*s + c0[h, i, j]", captured=("hij",)),
    Check("causal", torch.float32, 40, 16, 12, score="where(le(j, i), 0.25*s, -oo)"),
    Check("dropout", torch.float32, 33, 16, 12, heads=4, queries=20, dropout_p=0.2),
    Check("ties", torch.float32, 50, 8, 12, whole=True),
    Check("whole rows", torch.float32, 20, 8, 20),
)


def judged(check: Check, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def attention(check: Check, leaves: Any, dropout_p: float | None = None) -> Tensor:
        q, k, v, *captured = leaves
        p = check.dropout_p if dropout_p is None else dropout_p
        seed = check.seed(q.device) if p else None
        score = check.score_text
        return torch.ops.kvt.attention(q, k, v, captured, score, "p", check.topk, [], p, seed, name)[0]

    monkeypatch.setattr(correct, "attention", attention)
    return judge(check, HERE)["wrong"]


def test_twelve_cells_of_every_kind() -> None:
    assert len(CHECKS) == len({check.name for check in CHECKS}) == 12
    assert {check.dtype for check in CHECKS} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(check.captured for check in CHECKS)
    assert any(check.dropout_p and check.heads != check.kv_heads for check in CHECKS)


@pytest.mark.parametrize("check", FEW, ids=lambda check: check.name)
@pytest.mark.parametrize("lowering", ["aten", "c"])
def test_right_lowerings_are_found_right(check: Check, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(check, lowering, monkeypatch) == []


def test_wrong_lowerings_are_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with changed(dv=1.0001) as name:
        (fault,) = judged(FEW[0], name, monkeypatch)
        assert fault.startswith("dv: ")
    with changed(lambda x: x * 1.0001) as name:
        assert any(fault.startswith("out: ") for fault in judged(FEW[1], name, monkeypatch))
    with changed(lambda x: x * torch.nan) as name:
        assert judged(FEW[0], name, monkeypatch)


@pytest.mark.parametrize(
    ("topk", "said"), [(-1, "rows keep fewer"), (1, "below the k-th largest are kept")], ids=["one less", "one more"]
)
@pytest.mark.parametrize("check", FEW[:3], ids=lambda check: check.name)
def test_another_number_of_keys_is_seen(check: Check, topk: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    class Other(aten.AtenLowering):
        def forward(self, call: Any) -> Any:
            return super().forward(dataclasses.replace(call, topk=call.topk + topk))

    undo = lowerings.register("other k", Other())
    try:
        assert any(said in fault for fault in judged(check, "other k", monkeypatch))
    finally:
        undo()


# --- what is taken apart ----------------------------------------------------------------------------------------------


def record(cell: Cell, ratio: float) -> dict[str, Any]:
    return Measured(cell, {OURS: ratio, SDPA: 1.0}, {OURS: 1.0, SDPA: 1.0}).to_dict()


def test_the_slowest_are_those_furthest_from_their_bars() -> None:
    first, second, third = (races()[n].cell for n in range(3))  # bars of 2.0, 1.4 and 2.5
    found = {"a": record(first, 2.2), "b": record(second, 1.5), "c": record(third, 2.5)}
    assert profiling.slowest(found) == [first, second]
    found["c"] = record(third, 5.0)
    assert profiling.slowest(found) == [third, first]
    assert profiling.slowest({}) == [first, second]


def test_counters_are_read() -> None:
    text = (
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","Host"\n'
        '"","","ns","register/thread",""\n"0","forward","81000","214","h"\n"1","forward","90000","214","h"\n'
    )
    assert profiling.read_counters(text) == {
        "forward": {"gpu__time_duration.sum [ns]": "81000", "launch__registers_per_thread [register/thread]": "214"}
    }
    assert profiling.read_counters("==ERROR== nothing") == {}


# --- what is shown ----------------------------------------------------------------------------------------------------


def line_of(text: str, begin: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {begin}")]
    return found


def test_the_report_holds_results_against_the_bars(tmp_path: Any) -> None:
    folder = Folder(tmp_path)
    first, second, third = (races()[n].cell for n in range(3))
    about = {"gpu": "Test GPU", "driver": "580.1", "versions": {"torch": "2.11.0", "triton": "3.6.0"}}
    folder.save("machine.json", {"about": about})
    found = {"a": record(first, 1.25), "b": record(second, 1.5), "c": record(third, 2.0)}
    model = {"train": True, "ms": {"ours": 10.5, "dense": 10.0}, "ratios": {MODEL: 1.05}}
    folder.save("speed.json", {"races": found, "models": {"training step": model}})
    text = report.text(folder)
    for part in ("Test GPU", "driver 580.1", "torch 2.11.0", "triton 3.6.0"):
        assert part in text
    assert "1.25 × | met, aim too" in line_of(text, "forward, N ≤ 256")
    assert "2.00 × | met " in line_of(text, "forward, longer")
    assert "1.50 × | NOT MET" in line_of(text, "forward + backward")
    assert "not measured" in line_of(text, "eager KVT")
    assert "1.05 × | met " in line_of(text, "ViT-B/16")
    assert "1.50 NO" in line_of(text, str(second))
    assert "39 of 42 races were not begun" in text


def test_the_worst_cell_of_a_bar_counts(tmp_path: Any) -> None:
    folder = Folder(tmp_path)
    small, large = (Cell("bfloat16", 64, n, n // 2, False) for n in (1024, 4096))
    folder.save("speed.json", {"races": {"a": record(small, 1.0), "b": record(large, 2.6)}})
    line = line_of(report.text(folder), "forward, longer")
    assert "2.60 × | NOT MET" in line
    assert f"{large} (of 2)" in line


@pytest.mark.parametrize("broken", ["", "{", "[]"])
def test_a_report_of_a_folder_with_next_to_nothing(tmp_path: Any, broken: str) -> None:
    (tmp_path / "speed.json").write_text(broken)
    text = report.text(Folder(tmp_path))
    assert text.count("not measured") == len(BARS)
