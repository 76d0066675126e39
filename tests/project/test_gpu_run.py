"""`make gpu` as a machine: what is left when it is cut, what a step that hangs costs, what a second call skips, what is
carried.  Steps here are small commands; the last test runs the real ones through the stub driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import ROOT

from benchmarks.gpu import ablate, cache, conduct, fits, steps, suite, tuning
from benchmarks.gpu.conduct import Plan, run_step
from benchmarks.gpu.folder import FILES, Folder
from benchmarks.gpu.step import Context
from benchmarks.gpu.steps import STEPS, Step, chosen, limit

ONE, TWO, THREE = (Step("x", name, 1.0, name) for name in ("one", "two", "three"))
Command = Callable[[Step, float, Path], list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def commands(**code: str) -> Command:
    """Name of a step -> Python that its process runs; by default it writes a result and ends."""

    def command(step: Step, seconds: float, said: Path) -> list[str]:
        usual = f"open({str(said)!r}, 'w').write('{{\"summary\": \"fine\"}}'); print('{step.name} ran')"
        return [sys.executable, "-c", code.get(step.name, usual)]

    return command


def run(
    folder: Folder, command: Command, *which: Step, seconds: float = 60.0, **options: Any
) -> tuple[bool, list[str]]:
    said: list[str] = []
    good = conduct.conduct(Plan(which or (ONE, TWO), seconds, **options), folder, said.append, lambda: None, command)
    return good, said


def ended(folder: Folder) -> dict[str, str]:
    return {name: step["status"] for name, step in folder.load("run.json")["steps"].items()}


def gone(pid: int) -> bool:
    """Within five seconds; a zombie counts as gone."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


# --- time -------------------------------------------------------------------------------------------------------------


def test_parts_are_letters_or_names() -> None:
    assert chosen("") == list(STEPS)
    assert [step.name for step in chosen("d, a")] == ["machine", "speed", "model"]
    assert [step.name for step in chosen("suite")] == ["suite"]
    with pytest.raises(ValueError, match="no part 'z': parts are a, b, c, d, e"):
        chosen("a,z")


def test_what_a_step_leaves_goes_to_those_that_follow() -> None:
    two = [Step("x", "one", 1.0, ""), Step("x", "two", 3.0, "")]
    assert limit(80.0, two) == 20.0
    assert limit(80.0, two, dry=True) == 48.0
    assert limit(80.0, two[1:], dry=True) == 80.0
    assert limit(78.0, two[1:]) == 78.0
    assert limit(-1.0, two) == 0.0
    assert sum(step.share for step in STEPS) <= steps.SECONDS - steps.RESERVE


# --- steps that go wrong ----------------------------------------------------------------------------------------------


def test_steps_end_well(folder: Folder) -> None:
    good, said = run(folder, commands())
    assert good
    assert ended(folder) == {"one": "done", "two": "done"}
    assert folder.load("run.json")["steps"]["one"]["said"] == "fine"
    assert said[0].startswith("x one: done in ")
    assert "two ran" in (folder.path / "log.txt").read_text()


def test_a_step_that_fails_stops_no_other(folder: Folder) -> None:
    good, said = run(folder, commands(one="raise SystemExit('no such thing')"))
    assert not good
    assert ended(folder) == {"one": "failed", "two": "done"}
    assert "exit code 1: no such thing" in said[0]


HANGS = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time\\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(60)'])\n"
    "print('pid', child.pid, flush=True); time.sleep(60)"
)


def test_a_step_that_hangs_is_ended_with_all_it_started(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct, "GRACE_S", 0.5)
    facts = run_step(ONE, 2.0, folder, commands(one=HANGS))
    assert facts["status"] == "killed"
    assert "longer than its 2 s" in facts["reason"]
    (line,) = [x for x in (folder.path / "log.txt").read_text().splitlines() if x.startswith("pid")]
    assert gone(int(line.split()[1]))
    assert run(folder, commands(), TWO)[0]


def test_what_the_time_does_not_suffice_for_is_left_out(folder: Folder) -> None:
    good, said = run(folder, commands(), seconds=steps.RESERVE)
    assert not good
    assert ended(folder) == {"one": "left out", "two": "left out"}
    assert "the time is spent" in said[0]


CONDUCT = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import conduct
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.steps import Step
out = Path(sys.argv[1])
code = ("import os, time, sys; sys.path.insert(0, %r)\\n"
        "from benchmarks.gpu.step import _end_with; _end_with(os.getppid(), 60.0)\\n"
        "print('pid', os.getpid(), flush=True); time.sleep(60)" % os.getcwd())
def command(step, seconds, said):
    return [sys.executable, "-c", code if step.name == "two" else "print('first')"]
plan = conduct.Plan([Step("x", name, 1.0, name) for name in ("one", "two", "three")], 120.0)
conduct.conduct(plan, Folder(out), print, lambda: None, command)
"""


def test_cut_in_the_middle_it_leaves_whole_files_and_nothing_running(folder: Folder) -> None:
    """By SIGKILL, which nothing can prepare for."""
    process = subprocess.Popen([sys.executable, "-c", CONDUCT, str(folder.path)], cwd=ROOT)
    log = folder.path / "log.txt"
    for _ in range(300):
        if log.exists() and "pid" in log.read_text():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert ended(folder) == {"one": "done", "two": "running"}
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("pid")]
    assert gone(int(line.split()[1]))
    assert run(folder, commands(), ONE, TWO, THREE)[1][0] == "x one: done before"
    assert ended(folder) == {"one": "done", "two": "done", "three": "done"}


def test_told_to_end_it_ends_its_steps(folder: Folder) -> None:
    """SIGTERM, as `timeout` sends it."""
    code = f"import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n{CONDUCT}"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], cwd=ROOT)
    log = folder.path / "log.txt"
    for _ in range(300):
        if log.exists() and "pid" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("pid")]
    assert gone(int(line.split()[1]))


# --- the second call --------------------------------------------------------------------------------------------------


def test_the_second_call_does_what_is_not_done(folder: Folder) -> None:
    run(folder, commands(two="raise SystemExit(3)"))
    good, said = run(folder, commands(one="raise SystemExit(4)"))
    assert good
    assert [line.split(" in ")[0] for line in said] == ["x one: done before", "x two: done"]
    assert not run(folder, commands(one="raise SystemExit(4)"), again=True)[0]


@pytest.mark.parametrize("change", ["code", "gpus", "dry"])
def test_results_of_something_else_are_not_continued(
    change: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, commands())
    folder.save("speed.json", {"mine": 1})
    if change == "code":
        monkeypatch.setattr(conduct, "fingerprint", lambda: "other")
    if change == "gpus":
        monkeypatch.setattr(conduct, "gpus", lambda: ["another GPU"])
    said = run(folder, commands(), dry=change == "dry")[1]
    assert not any("done before" in line for line in said)
    (aside,) = folder.path.glob("before-*")
    assert Folder(aside).load("speed.json") == {"mine": 1}
    assert folder.load("speed.json") == {}


def test_a_file_of_other_code_is_begun_anew(folder: Folder) -> None:
    context = Context(folder, 10.0)
    context.save("speed.json", races={"a": 1})
    context.save("speed.json", models={"b": 2})
    assert context.load("speed.json")["races"] == {"a": 1}
    other = Context(folder, 10.0)
    other.of["code"] = "other"
    assert other.load("speed.json") == {}
    other.save("speed.json", models={})
    assert "races" not in folder.load("speed.json")


def test_an_earlier_folder_is_taken_over(folder: Folder, tmp_path: Path) -> None:
    earlier = Folder(tmp_path / "earlier")
    run(earlier, commands())
    earlier.save("speed.json", {"races": {}})
    folder.save("speed.json", {"mine": 1})
    assert folder.take_over(earlier.path) == ["run.json"]
    assert folder.load("speed.json") == {"mine": 1}
    assert run(folder, commands())[1] == ["x one: done before", "x two: done before"]
    with pytest.raises(FileNotFoundError):
        folder.take_over(tmp_path / "nowhere")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_at_any_moment(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save("run.json", {"a": 1})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save("run.json", {"a": 2})
    assert folder.load("run.json") == {"a": 1}
    folder.clean()
    assert sorted(x.name for x in folder.path.iterdir()) == ["run.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.save("run.json", {"a": float("nan")})


def test_files_fit_through_a_narrow_door() -> None:
    assert len(FILES) == len(set(FILES)) == 8


def test_tuning_results_of_an_earlier_step_are_used(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuning import KEY

    from kvt_compile.kernels.tune import transfer
    from kvt_compile.kernels.tune.entry import Entry
    from kvt_compile.kernels.tune.store import Store

    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "cache"))
    context = Context(folder, 10.0)
    assert tuning.import_results(context) == 0
    folder.path.mkdir()
    transfer.write(folder.path / "tuned.json", [Entry(KEY, {"rows": 16})])
    assert tuning.import_results(context) == 1
    assert Store(tmp_path / "cache" / "tune").load(KEY) is not None
    (folder.path / "tuned.json").write_text("{")
    assert tuning.import_results(context) == 0


def test_outcomes_of_tests_are_written_as_they_come(folder: Folder, tmp_path: Path) -> None:
    folder.save("correct.json", {"cells": {"a": 1}, "tests": {"without": []}})
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_skipped(): pytest.skip('so')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.suite", "-p", "no:cacheprovider"]
    environment = os.environ | {"KVT_GPU_SUITE": str(folder.path)}
    subprocess.run(
        [*command, "--noconftest", "-c", os.devnull, f"--rootdir={tmp_path}", str(tmp_path / "test_three.py")],
        cwd=ROOT, env=environment, capture_output=True, timeout=600,
    )  # fmt: skip
    found = folder.load("correct.json")
    assert found["cells"] == {"a": 1}
    assert found["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["tests"]["finished"]
    assert "assert 1 == 2" in found["tests"]["failed"][0]["said"]


def test_the_launches_of_the_gpu_tests_are_where_the_cache_looks_for_them() -> None:
    text = (ROOT / suite.LAUNCHES).read_text()
    for name in suite.OF_GPU_TESTS.split(" or "):
        assert "\n@pytest.mark.slow\n" in text.partition(f"\ndef {name}(")[0], name
        assert f"\ndef {name}(" in text


def test_this_python_is_asked_before_an_environment_is_made() -> None:
    complaint = fits.complaint()
    assert bool(complaint) == (not torch.cuda.is_available())


# --- kernels that are carried -----------------------------------------------------------------------------------------


@pytest.fixture
def stub() -> Iterator[Any]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the stub driver is for machines without a GPU")
    from stub_gpu import stub as on_stub

    with on_stub("sm_90") as found:
        yield found


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    # not the knob: put back, it would be set in this process and hide the variable from then on
    return lambda path: monkeypatch.setenv("TRITON_CACHE_DIR", str(path))


def launched(launcher: Any) -> Any:
    """What Triton compiled for the forward of a small attention, as in a fresh process: in memory there is nothing."""
    from kvt_compile.kernels.op.call import AttentionCall
    from kvt_compile.kernels.op.spec import KernelSpec
    from kvt_compile.kernels.triton.blocks import Blocks
    from kvt_compile.kernels.triton.generate import module_source
    from kvt_compile.kernels.triton.module import load

    made: list[Any] = []

    class Kept(launcher):  # type: ignore[misc]
        def kernel(self, spec: Any, part: str) -> Any:
            return getattr(load(module_source(spec)), part)

        def launch(self, *arguments: Any) -> Any:
            made.append(super().launch(*arguments))
            return made[-1]

    q, k, v = (torch.zeros(2, 3, 40, 16) for _ in range(3))
    call = AttentionCall(KernelSpec.of(q, k, v, (), "0.25*s"), q, k, v, (), 12)
    Kept(chooser=lambda launch: Blocks("streaming", 16, 16, 4, 1)).forward(call)
    return made[0]


def test_a_packed_cache_is_found_again(stub: Any, triton_cache: Callable[[Path], None], tmp_path: Path) -> None:
    from kvt_compile.kernels.triton.launch import Launcher

    triton_cache(tmp_path / "first")
    launched(Launcher)
    assert len(stub.compiled) == 1
    archive = tmp_path / "archive.tar.xz"
    assert cache.pack(tmp_path / "first", archive) == 1
    (tmp_path / "first").rename(tmp_path / "gone")
    assert cache.unpack(archive, tmp_path / "second") == 1
    triton_cache(tmp_path / "second")
    launched(Launcher)
    assert len(stub.compiled) == 1, "compiled again"
    assert not list((tmp_path / "second").glob("*/*.ptx"))
    triton_cache(tmp_path / "third")
    launched(Launcher)
    assert len(stub.compiled) == 2


def test_a_key_depends_on_the_target_and_on_nothing_else_of_the_driver(
    stub: Any, triton_cache: Callable[[Path], None], tmp_path: Path
) -> None:
    """What the stub compiles has the hash that Triton's own driver would ask for on a card of capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from kvt_compile.kernels.triton.launch import Launcher

    triton_cache(tmp_path)
    made = launched(Launcher)
    real = SimpleNamespace(get_current_device=lambda: 0, get_device_capability=lambda device: (9, 0))
    target = CudaDriver.get_current_target(real)
    assert target == GPUTarget("cuda", 90, 32) == triton.runtime.driver.active.get_current_target()
    options = {"num_warps": 4, "enable_fp_fusion": False}
    before = len(stub.compiled)
    triton.runtime.driver._active = None  # no driver at all
    again = triton.compile(made.src, target=target, options=options)
    assert again.hash == made.hash
    assert len(stub.compiled) == before


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(__file__, arcname="../outside.py")
    with pytest.raises(ValueError, match=r"it holds '\.\./outside\.py'"):
        cache.unpack(archive, tmp_path / "cache")
    assert not (tmp_path / "outside.py").exists()


# --- kernels without a part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ablate.CUTS)
def test_a_part_that_is_cut_is_gone_and_the_rest_launches(part: str, stub: Any) -> None:
    from kvt_compile.kernels.op.spec import KernelSpec
    from kvt_compile.kernels.triton.generate import module_source

    spec = KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s")
    whole = module_source(spec)
    cut = ablate.without(whole, part)
    assert len(cut) < len(whole)
    assert cut.count("\ndef ") == whole.count("\ndef ")
    q, k, v = (torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    from kvt_compile.kernels.op.call import AttentionCall

    before = stub.launches
    ablate.Ablated(part).forward(AttentionCall(KernelSpec.of(q, k, v, (), "0.125*s"), q, k, v, (), 150))
    assert stub.launches == before + 1


def test_a_part_that_is_not_there_is_told() -> None:
    with pytest.raises(ablate.NoSuchPartError, match="no function select"):
        ablate.without("def other(x):\n    return x\n", "search")


# --- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_dry_run_leaves_every_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--cache", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert sorted(x.name for x in out.iterdir()) == sorted(FILES)
    data = {name: json.loads((out / name).read_text()) for name in FILES if name.endswith(".json")}
    assert {step["status"] for step in data["run.json"]["steps"].values()} == {"done"}
    assert len(data["correct.json"]["cells"]) == 12
    assert not any(record["ms"] or record["ratios"] for record in data["speed.json"]["races"].values())
    assert "No number was computed or timed" in (out / "report.md").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.stdout.count("done before") == len(STEPS)
