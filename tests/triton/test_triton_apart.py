"""Block sizes measured in another process: a fault costs one candidate, and what was compiled before is found.  On the
stub driver, so that times mean nothing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from launching import run
from spec_calls import call_of
from stub_gpu import Stub, stub
from triton_specs import GATED, training
from tuning import CANDIDATES, DEFAULT, KEY, FakeClock, speed, tuner_of

from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec
from kvt_compile.kernels.triton import apart
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch
from kvt_compile.kernels.triton.jobs import Described, Job
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.tune.race import CannotMeasureError, Effort, Outcome
from kvt_compile.kernels.tune.store import Store

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stub driver is for machines without a GPU")
SMALL, WIDE, FAULTY, NARROW = (
    Blocks("streaming", 16, cols, warps, 1) for cols, warps in ((16, 4), (32, 4), (16, 8), (16, 2))
)
QUICK = Effort(seconds=0.0, first_turns=1, turns=1)
SPEC = KernelSpec("bfloat16", "bfloat16", 16, 16, score="s + c0[h, i, j]", captured=(CapturedSpec("float32", 3),))


@pytest.fixture
def gpu() -> Iterator[Stub]:
    with stub("sm_90") as found:
        yield found


def jobs_of(gpu: Stub, spec: KernelSpec) -> dict[str, Job]:
    """Kernel -> its job, as launches describe them."""
    found: dict[str, Job] = {}

    def chooser(launch: Launch) -> Blocks:
        assert launch.job is not None
        found[launch.part] = launch.job()
        return SMALL

    run(gpu, call_of(spec, 20, 40, heads=4, kv_heads=2), Launcher(chooser=chooser))
    return found


def measured(job: Job, candidates: tuple[Blocks, ...], within: str) -> tuple[Outcome[Blocks], list[Blocks]]:
    told: list[Blocks] = []
    return apart.measure(job, candidates, QUICK, told.append, f"faulty_gpu:{within}"), told


def test_a_candidate_that_ends_the_process_costs_itself(gpu: Stub) -> None:
    job = jobs_of(gpu, SPEC)["forward"]
    outcome, told = measured(job, (SMALL, FAULTY, WIDE), "faulty")
    assert {x for x, _ in outcome.times} == {SMALL, WIDE}
    assert all(ms > 0 for _, ms in outcome.times)
    ((dropped, reason),) = outcome.dropped
    assert dropped == FAULTY
    assert "ended the process that ran it" in reason
    assert told == [SMALL, FAULTY, SMALL, WIDE]  # another process tries the rest


def test_what_the_pool_compiles_is_what_is_launched(gpu: Stub, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(apart.os, "sched_getaffinity", lambda pid: {0, 1})
    spec = dataclasses.replace(training(GATED), needs_grad=(False, False, True, False, False))
    jobs = jobs_of(gpu, spec)
    assert list(jobs) == gpu.specialised == ["backward_rows", "backward_kv"]
    apart.compile_in_pool(jobs["backward_kv"], (WIDE, NARROW), QUICK)
    for blocks in (WIDE, NARROW):
        gpu.compiled.clear()
        run(gpu, call_of(spec, 20, 40, heads=4, kv_heads=2), Launcher(chooser=lambda launch, x=blocks: x))
        assert [name for name, _ in gpu.compiled] == ["backward_rows"]  # which the pool was not asked for


@pytest.mark.slow
def test_a_candidate_that_cannot_be_compiled_is_dropped_with_its_reason(gpu: Stub) -> None:
    job = jobs_of(gpu, SPEC)["forward"]
    outcome, _ = measured(job, (Blocks("streaming", 16, 8, 4, 1),), "sound")
    assert outcome.times == []
    assert "CompilationError" in outcome.dropped[0][1]


def test_where_no_process_can_measure_this_one_does(gpu: Stub, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    job = jobs_of(gpu, SPEC)["forward"]
    with pytest.raises(CannotMeasureError, match="no GPU for this process"):
        measured(job, (SMALL,), "absent")

    def cannot(*_: Any) -> Any:
        raise CannotMeasureError("no GPU for this process")

    tuner, _ = tuner_of(Store(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert tuner.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock(), cannot).rows == 32
    assert "measured in this process" in caplog.text


def test_times_from_another_process_are_kept_as_from_this_one(tmp_path: Any) -> None:
    first, second = CANDIDATES[:2]

    def there(candidates: Any, effort: Effort, tell: Any) -> Outcome[Any]:
        for x in candidates:
            tell(x)
        return Outcome([(first, 2.0), (second, 1.0)], [(DEFAULT, "ended the process that ran it: signal 6")])

    tuner, steps = tuner_of(Store(tmp_path))
    assert tuner.pick(KEY, CANDIDATES, DEFAULT, never, "on", never, there) == second
    entry = tuner.store.load(KEY)
    assert entry is not None
    assert [x.milliseconds for x in entry.measured] == [1.0, 2.0]
    assert entry.dropped[0].reason == "ended the process that ran it: signal 6"
    assert steps[-1].winner == second.to_dict()


def never(*_: Any) -> Any:
    raise AssertionError("nothing is measured here")


@pytest.mark.parametrize("shape", [(3, 4), (), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64], ids=str)
def test_a_described_tensor_is_made_again(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    for y in (x, x.t() if len(shape) == 2 else x, x.expand(5, *shape)):
        found = Described.of(y).like(torch.device("cpu"))
        assert (found.shape, found.stride(), found.dtype) == (y.shape, y.stride(), dtype)
        if not dtype.is_floating_point:
            assert (found == (1 if dtype == torch.bool else 0)).all()
