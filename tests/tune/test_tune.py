"""The autotuner in one process: keys, choice, modes, failures, what a person sees."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuning import CANDIDATES, DEFAULT, KEY, Block, FakeClock, speed, tuner_of

import kvt_compile
from kvt_compile.kernels import lowerings, tune
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import SoftmaxSpec
from kvt_compile.kernels.plain.aten import AtenLowering
from kvt_compile.kernels.tune import Key, Mode, ShapeClass, Unfit, tuner
from kvt_compile.kernels.tune.key import round_up, slug
from kvt_compile.kernels.tune.progress import LogProgress, Step
from kvt_compile.kernels.tune.store import Store
from kvt_compile.kernels.tune.timing import DeviceClock, WallClock, medians, take_turns
from kvt_compile.kernels.tune.tuner import Effort


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tune", tmp_path / "shipped")


def never(candidate: Block) -> Callable[[], object]:
    raise AssertionError(f"{candidate} was tried")


# --- keys -------------------------------------------------------------------------------------------------------------


class TestKey:
    def test_sizes_round_up_to_quarters_of_a_power_of_two(self) -> None:
        assert [round_up(n) for n in (0, 1, 7, 8, 9, 196, 197, 256, 257, 576, 1024, 1025, 16384)] == [
            0, 1, 7, 8, 10, 224, 224, 256, 320, 640, 1024, 1280, 16384,
        ]  # fmt: skip
        sizes = [round_up(n) for n in range(1, 5000)]
        assert sizes == sorted(sizes)
        assert all(n <= size <= 1.25 * n + 1 for n, size in enumerate(sizes, 1))

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((197, 197, 12, 99), ShapeClass(224, 224, 16, 5)),
            ((197, 197, 12, 98), ShapeClass(224, 224, 16, 4)),
            ((1, 4096, 100_000, 1), ShapeClass(1, 4096, 1024, 1)),
            ((16, 16, 1, 40), ShapeClass(16, 16, 1, 8)),
            ((0, 0, 0, 1), ShapeClass(0, 0, 1, 1)),
        ],
        ids=str,
    )
    def test_shape_class(self, shape: tuple[int, int, int, int], expected: ShapeClass) -> None:
        assert ShapeClass.of(*shape) == expected

    def test_round_trip(self) -> None:
        assert Key.from_dict(json.loads(json.dumps(KEY.to_dict()))) == KEY

    @pytest.mark.parametrize("name", ["device", "capability", "kernel", "part", "triton"])
    def test_every_part_makes_another_result(self, name: str) -> None:
        other = Key.from_dict(KEY.to_dict() | {name: "other"})
        assert other != KEY
        assert (other.folder, other.name) != (KEY.folder, KEY.name)

    def test_the_description_makes_none(self) -> None:
        other = Key.from_dict(KEY.to_dict() | {"description": "other"})
        assert (other, other.name) == (KEY, KEY.name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"device": 3}, "key.device is 3, expected text"),
            ({"shape": [1]}, r"key.shape is \[1\], expected an object"),
            ({"shape": {"queries": 1}}, "key.shape has no field 'keys'"),
            ({"more": 1}, "key has an unknown field 'more'"),
        ],
        ids=str,
    )
    def test_what_is_no_key_is_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Key.from_dict(KEY.to_dict() | change)

    def test_names_of_devices_are_names_of_folders(self) -> None:
        assert KEY.folder == "nvidia-test-9000-9.0"
        assert slug("../../etc") == "etc"
        assert slug("!!") == "unnamed"

    def test_a_device_without_capability(self) -> None:
        key = Key.on(torch.device("cpu"), kernel="0", part="forward", triton="", shape=KEY.shape)
        assert (key.device, key.capability) == ("cpu", "")


# --- timing -----------------------------------------------------------------------------------------------------------


class TestTiming:
    def test_contestants_take_turns(self) -> None:
        order: list[str] = []
        runs = [lambda name=name: order.append(name) or 1.0 for name in "ab"]
        take_turns(runs, FakeClock(), 0.0, at_least=3)
        assert order == list("ababab")

    def test_until_the_time_is_up_and_not_beyond_the_most(self) -> None:
        runs = [lambda: 10.0, lambda: 30.0]
        assert len(take_turns(runs, FakeClock(), 0.4)[0]) == 10
        assert len(take_turns(runs, FakeClock(), 100.0, at_most=7)[0]) == 7
        assert take_turns([], FakeClock(), 1.0) == []

    def test_median_without_the_first_call(self) -> None:
        times = iter([100.0, 3.0, 1.0, 2.0])
        assert medians([lambda: next(times)], FakeClock(), 0.0, at_least=3) == [2.0]

    def test_wall_clock_measures_milliseconds(self) -> None:
        clock = WallClock()
        before = clock.now()
        took = clock.milliseconds(lambda: sum(range(20_000)))
        assert 0.0 < took <= 1e3 * (clock.now() - before)

    @pytest.mark.gpu
    def test_device_clock_measures_the_device_and_not_the_host(self) -> None:
        clock = DeviceClock(torch.device("cuda", torch.cuda.current_device()), lead_ms=2.0)
        x = torch.randn(1024, 1024, device="cuda")

        def queued() -> None:
            for _ in range(3):
                x.mul(2.0)

        once, many = medians([lambda: x.mul(2.0), queued], clock, 0.1)
        assert 1.5 * once < many < 6.0 * once


# --- the choice -------------------------------------------------------------------------------------------------------


class TestPick:
    def test_the_fastest_is_used_and_kept(self, store: Store) -> None:
        mine, steps = tuner_of(store)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on", FakeClock()) == Block(32)
        data = json.loads(store.path(KEY).read_text())
        assert data["winner"] == {"rows": 32}
        assert data["key"]["device"] == "NVIDIA Test 9000"
        assert data["key"]["shape"] == {"queries": 224, "keys": 224, "heads": 32, "kept": 5}
        assert [(x["candidate"]["rows"], x["milliseconds"]) for x in data["measured"]] == [
            (32, 1.0), (64, 1.5), (16, 2.0), (128, 3.0),
        ]  # fmt: skip
        assert data["dropped"] == []
        assert steps[-1].winner == {"rows": 32}

    @pytest.mark.parametrize("mode", ["cached", "on"])
    def test_another_process_finds_it(self, store: Store, mode: Mode) -> None:
        tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock())
        later, steps = tuner_of(store)
        assert later.pick(KEY, CANDIDATES, DEFAULT, never, mode) == Block(32)
        assert steps == []

    def test_another_shape_does_not(self, store: Store) -> None:
        tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock())
        other = Key.from_dict(KEY.to_dict() | {"part": "backward_q"})
        assert tuner_of(store)[0].pick(other, CANDIDATES, DEFAULT, never, "cached") == DEFAULT

    def test_off_is_the_default_whatever_is_known(self, store: Store) -> None:
        mine, _ = tuner_of(store)
        mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock())
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "off") == DEFAULT

    def test_cached_measures_nothing_and_on_still_may(self, store: Store) -> None:
        mine, _ = tuner_of(store)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never) == DEFAULT
        assert not store.folder.exists()
        assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)

    def test_a_miss_is_not_looked_up_at_every_launch(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        mine, _ = tuner_of(store)
        looked: list[Key] = []
        monkeypatch.setattr(store, "load", lambda key: looked.append(key))
        for _ in range(3):
            mine.pick(KEY, CANDIDATES, DEFAULT, never)
        assert len(looked) == 1
        mine.forget()
        mine.pick(KEY, CANDIDATES, DEFAULT, never)
        assert len(looked) == 2

    def test_the_default_competes_without_being_a_candidate(self, store: Store) -> None:
        mine, _ = tuner_of(store)
        picked = mine.pick(KEY, (Block(16), Block(128)), DEFAULT, speed, "on", FakeClock())
        assert picked == DEFAULT

    def test_candidates_are_listed_only_to_measure(self, store: Store) -> None:
        listed: list[int] = []

        def candidates() -> tuple[Block, ...]:
            listed.append(1)
            return CANDIDATES

        mine, _ = tuner_of(store)
        assert mine.pick(KEY, candidates, DEFAULT, speed) == DEFAULT
        assert listed == []
        assert mine.pick(KEY, candidates, DEFAULT, speed, "on", FakeClock()) == Block(32)
        assert mine.pick(KEY, candidates, DEFAULT, speed, "on", FakeClock()) == Block(32)
        assert listed == [1]

    def test_near_rivals_get_more_turns_than_hopeless_ones(self, store: Store) -> None:
        clock = FakeClock()
        took = {16: 1.0, 32: 1.1, 64: 5.0}
        mine, _ = tuner_of(store, effort=Effort(seconds=0.5))
        mine.pick(KEY, CANDIDATES[:2], DEFAULT, lambda c: lambda: took[c.rows], "on", clock)
        turns = {ms: clock.calls.count(ms) for ms in took.values()}
        assert turns[5.0] == 1 + Effort.first_turns
        assert turns[1.0] == turns[1.1] > 100

    def test_one_lucky_turn_does_not_win(self, store: Store) -> None:
        calls: dict[int, int] = {}

        def run(candidate: Block) -> Callable[[], float]:
            def once() -> float:
                n = calls[candidate.rows] = calls.get(candidate.rows, 0) + 1
                return {16: 0.1 if n == 3 else 1.2, 32: 1.0, 64: 1.5}[candidate.rows]

            return once

        picked = tuner_of(store)[0].pick(KEY, CANDIDATES[:2], DEFAULT, run, "on", FakeClock())
        assert picked == Block(32)


class TestFailures:
    def test_what_fails_is_dropped_with_its_reason(self, store: Store) -> None:
        def run(candidate: Block) -> Callable[[], float]:
            if candidate == Block(32):
                raise Unfit("spills 12 registers")
            if candidate == Block(64):
                return lambda: (_ for _ in ()).throw(RuntimeError("out of resources\nsecond line"))
            return speed(candidate)

        picked = tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, run, "on", FakeClock())
        assert picked == Block(16)
        assert {x["candidate"]["rows"]: x["reason"] for x in json.loads(store.path(KEY).read_text())["dropped"]} == {
            64: "RuntimeError: out of resources",
            32: "spills 12 registers",
        }

    def test_when_all_fail_the_default_runs_and_none_is_tried_again(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        tried: list[Block] = []

        def run(candidate: Block) -> Callable[[], float]:
            tried.append(candidate)
            raise ValueError("no such GPU")

        mine, _ = tuner_of(store)
        assert [mine.pick(KEY, CANDIDATES, DEFAULT, run, "on", FakeClock()) for _ in range(2)] == [DEFAULT] * 2
        assert len(tried) == len(CANDIDATES)
        assert "none of 4 block sizes" in caplog.text
        assert "no such GPU" in caplog.text
        assert not store.path(KEY).exists()

    def test_a_failure_while_timing_ends_in_the_default(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        def run(candidate: Block) -> Callable[[], float]:
            left = iter([1.0, 1.0])
            return lambda: next(left)

        mine, _ = tuner_of(store)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, run, "on", FakeClock()) == DEFAULT
        assert "failed, the default stays: StopIteration" in caplog.text
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on") == DEFAULT

    def test_a_user_may_interrupt(self, store: Store) -> None:
        def run(candidate: Block) -> Callable[[], float]:
            raise KeyboardInterrupt

        mine, _ = tuner_of(store)
        with pytest.raises(KeyboardInterrupt):
            mine.pick(KEY, CANDIDATES, DEFAULT, run, "on", FakeClock())
        # and nothing stays locked
        assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        mine, _ = tuner_of(Store(tmp_path / "file" / "tune"))
        with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*file/tune.*KVT_CACHE_DIR"):
            assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on") == Block(32)


class TestCapture:
    def test_nothing_is_timed_while_a_graph_is_captured(self, store: Store) -> None:
        capturing = True
        mine, _ = tuner_of(store, capturing=lambda: capturing)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on") == DEFAULT
        capturing = False
        assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)
        capturing = True
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on") == Block(32)

    def test_but_a_stored_result_is_used(self, store: Store) -> None:
        tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock())
        mine, _ = tuner_of(store, capturing=lambda: True)
        assert mine.pick(KEY, CANDIDATES, DEFAULT, never, "on") == Block(32)

    def test_no_capture_without_a_gpu(self) -> None:
        assert tuner.is_capturing() is False

    @pytest.mark.gpu
    def test_a_real_capture_is_noticed(self) -> None:
        found: list[bool] = []
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
            found.append(tuner.is_capturing())
        assert [*found, tuner.is_capturing()] == [True, False]


class TestProgress:
    def test_every_candidate_is_told(self, store: Store) -> None:
        mine, steps = tuner_of(store)
        mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock())
        told = [(x.done, x.total, x.candidate and x.candidate["rows"]) for x in steps]
        assert told == [(0, 4, 64), (1, 4, 16), (2, 4, 32), (3, 4, 128), (4, 4, None), (4, 4, None)]
        assert (steps[-1].winner, steps[-1].milliseconds) == ({"rows": 32}, 1.0)

    def test_the_log_is_quiet_about_what_is_quick_and_not_about_what_takes_long(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = iter([0.0, 3.0, 6.0, 7.0, 12.0])
        tell = LogProgress(patience_s=5.0, now=lambda: next(seconds))
        with caplog.at_level(logging.INFO, logger="kvt_compile.tune"):
            for done in range(5):
                tell(Step(KEY, done, 5, candidate={}))
            tell(Step(KEY, 5, 5, winner={"rows": 32}, milliseconds=1.0))
        levels = [record.levelname for record in caplog.records]
        assert levels == ["INFO", "INFO", "WARNING", "INFO", "WARNING", "INFO"]
        assert "tuning the forward kernel for Nq≤224 Nk≤224" in caplog.text
        assert "2 of 5 block sizes tried" in caplog.messages[2]
        assert "1.000 ms" in caplog.messages[-1]


# --- the process's tuner, and the option ------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The process's tuner over a folder of the test."""
    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path))
    tuner.process_tuner.cache_clear()
    yield tuner.process_tuner()
    tuner.process_tuner.cache_clear()


def test_results_lie_beside_the_built_kernels(process: tune.Tuner, tmp_path: Path) -> None:
    from kvt_compile.kernels.c import settings

    assert process.store.folder == tmp_path / "tune"
    assert settings.from_environment().cache == tmp_path
    steps: list[Step] = []
    with tune.watching(steps.append):
        assert tune.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)
    assert steps
    assert process.progress != steps.append


class Asking(AtenLowering):
    """Notes at every launch which mode holds for its kernel, as a lowering with block sizes would ask."""

    name = "asking"

    def __init__(self) -> None:
        self.modes: list[tuple[str, Mode]] = []

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        self.modes.append(("forward", tune.requested(call.spec)))
        return super().forward(call)

    def backward(self, call: AttentionCall, *saved: Tensor) -> Any:
        self.modes.append(("backward", tune.requested(call.spec)))
        return super().backward(call, *saved)

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        self.modes.append(("softmax", tune.requested(SoftmaxSpec("float32", "float32"))))
        return super().softmax(scores, dim, topk, dtype)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Any:
    lowering = Asking()
    undo = lowerings.register("asking", lowering)
    monkeypatch.setattr("kvt_compile.kernels.tune.mode._requested", {})
    yield lowering
    undo()


class Net(nn.Module):
    """One fused site with a bias, one whose scores are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 7, 7))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (q @ k.mT + self.bias).softmax(-1) @ v
        return (x @ k.mT).softmax(-1).flip(1) @ v


@pytest.mark.parametrize("way", ["backend", "rewrite"])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_option_reaches_every_kernel_of_the_model(asking: Asking, way: str, mode: Mode) -> None:
    net = Net()
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    options = {"autotune": mode, "lowering": "asking"}
    if way == "backend":
        run = torch.compile(net, backend="kvt", options=options)
    else:
        run = kvt_compile.rewrite(net, q, k, v, **options).module
    run(q, k, v).sum().backward()
    assert asking.modes == [("forward", mode), ("softmax", mode), ("backward", mode)]


def test_without_the_option_what_is_cached_is_used(asking: Asking) -> None:
    net = Net()
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    kvt_compile.explain(net, q, k, v, autotune="on")  # asks for nothing: it only explains
    kvt_compile.topk_attention(q, k, v, topk=3, lowering="asking")
    assert asking.modes == [("forward", "cached")]


@pytest.mark.parametrize("given", ["On", "", None, True, 1])
def test_a_mode_that_is_none_is_named(given: Any) -> None:
    with pytest.raises(kvt_compile.OptionError, match="autotune must be one of 'off', 'cached', 'on', got"):
        kvt_compile.config.make_options({"autotune": given})
