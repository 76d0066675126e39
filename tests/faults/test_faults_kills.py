"""Killed builds, races and full disks: nothing half-written is used, and what is left behind is seen and swept."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_result import Result
from faults import COUNTS, SCALE, SPEC, compiler, fresh, in_fork, softmax, three_calls
from tuning import KEY

from kvt_compile.doctor import machine
from kvt_compile.kernels.c import CLowering, Settings, objects
from kvt_compile.kernels.disk.write import leftovers, locked_folder, sweep, work_folder, write_own
from kvt_compile.kernels.tune.entry import Entry
from kvt_compile.kernels.tune.store import Store


@pytest.fixture
def kvt_cache(kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    fresh()
    return lambda *words: kvt("cache", *words)


def killed_after(seconds: float, work: Callable[[], Any]) -> None:
    """Runs `work` in a fork and kills it, and only it, after a while."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            fresh()
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    COUNTS["kills"] += 1


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_killed_build_is_seen_and_removed(kvt_cache: Callable[..., Result], tmp_path: Path) -> None:
    slow = str(compiler(tmp_path / "bin", "sleep 3"))
    settings = Settings(tmp_path / "cache", slow)
    killed_after(1.0, lambda: CLowering(settings).built(SPEC))
    (left,) = [x for x in (tmp_path / "cache" / "c").iterdir() if x.name.startswith(".")]
    (row,) = json.loads(kvt_cache("list", "--json").out)["items"]
    assert (row["name"], row["kind"]) == (left.name, "c")
    assert "killed" in row["what"]
    assert "1 leftover" in kvt_cache("list").out
    assert machine.cache(settings).leftovers == 1
    assert kvt_cache("clear", "--yes").code == 0
    assert list((tmp_path / "cache" / "c").iterdir()) == []


def test_or_swept_by_the_next_build(kvt_cache: Callable[..., Result], tmp_path: Path) -> None:
    slow = Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", "sleep 3")))
    killed_after(1.0, lambda: CLowering(slow).built(SPEC))
    assert softmax(CLowering(Settings(tmp_path / "cache")))
    assert {x.suffix for x in (tmp_path / "cache" / "c").iterdir()} == {".c", ".so"}


def test_a_temporary_folder_of_a_killed_process_is_swept(kvt_cache: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, so that kernels go elsewhere")
    killed_after(0.6, lambda: (CLowering(Settings(tmp_path / "cache")).built(SPEC), time.sleep(60)))
    assert len(list((tmp_path / "tmp").glob("kvt_compile.build-*"))) == 1
    found = three_calls(KVT_CACHE_DIR=str(tmp_path / "cache"), TMPDIR=str(tmp_path / "tmp"))
    assert found["built"]
    left = list((tmp_path / "tmp").glob("kvt_compile.build-*"))
    assert len(left) == 1  # the fork's own: it ends without clean-up
    sweep(tmp_path / "tmp", "kvt_compile.build-*")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_build_that_goes_on_is_left_alone(kvt_cache: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "c"
    folder.mkdir(parents=True)
    with work_folder(folder, ".abc-") as work:
        assert leftovers(folder) == []
        assert kvt_cache("list").out.startswith("nothing in")
        kvt_cache("clear", "--yes")
        sweep(folder)
        assert in_fork(lambda: [sweep(folder), work.is_dir()][-1])  # nor by another process
        assert work.is_dir()
    assert not work.exists()


def test_half_a_kernel_is_listed_and_removed(kvt_cache: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "cache" / "c").mkdir(parents=True)
    (tmp_path / "cache" / "c" / "0123.c").write_text("int kvt;")
    assert [x["name"] for x in json.loads(kvt_cache("list", "--json").out)["items"]] == ["0123"]
    assert kvt_cache("clear", "--yes").code == 0
    assert list((tmp_path / "cache" / "c").iterdir()) == []


@pytest.mark.parametrize("seed", range(6 * SCALE))
def test_killed_at_any_moment(kvt_cache: Callable[..., Result], tmp_path: Path, seed: int) -> None:
    """What is there afterwards is whole, and the next process has its kernel."""
    settings = Settings(tmp_path / "cache")
    killed_after(random.Random(seed).uniform(0.0, 0.8), lambda: CLowering(settings).built(SPEC))
    assert all(objects.is_whole(path) for path in (tmp_path / "cache" / "c").glob("*.so"))
    found = three_calls(KVT_CACHE_DIR=str(tmp_path / "cache"))
    assert (found["right"], found["built"], found["warnings"]) == (True, True, [])
    assert {x.suffix for x in (tmp_path / "cache" / "c").iterdir() if not x.name.startswith(".")} == {".c", ".so"}
    assert kvt_cache("clear", "--yes").code == 0
    assert list((tmp_path / "cache" / "c").iterdir()) == []


@pytest.mark.parametrize("seed", range(3 * SCALE))
def test_a_killed_write_of_a_result(tmp_path: Path, seed: int) -> None:
    store = Store(tmp_path / "tune")

    def work() -> None:
        for rows in range(10_000):
            store.save(Entry(KEY, {"rows": 1 << rows % 5}))

    killed_after(random.Random(seed).uniform(0.02, 0.2), work)
    assert all(store.parse(path).key == KEY for path in store.files())
    store.save(Entry(KEY, {"rows": 16}))
    assert store.unfinished() == []


# --- races ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", range(SCALE))
def test_ten_processes_and_one_cold_kernel(tmp_path: Path, round_: int) -> None:
    """While an eleventh sweeps all the time."""
    reading, writing = os.pipe()
    children = []
    for number in range(11):
        child = os.fork()
        if child == 0:
            result = b"x"
            try:
                fresh()
                if number == 10:
                    end = time.monotonic() + 3
                    while time.monotonic() < end:
                        sweep(tmp_path / "cache" / "c")
                    result = b"."
                else:
                    lowering = CLowering(Settings(tmp_path / "cache"))
                    result = b"." if softmax(lowering) and lowering.built(SPEC) else b"x"
            finally:
                os.write(writing, result)
                os._exit(0)
        children.append(child)
    os.close(writing)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"." * 11
    COUNTS["races of ten processes"] += 1
    assert sorted(x.suffix for x in (tmp_path / "cache" / "c").iterdir()) == [".c", ".so"]


def test_folders_that_are_made_while_others_sweep(tmp_path: Path) -> None:
    """Between making a folder and locking it, a sweep may come: then it is made anew."""
    child = os.fork()
    if child == 0:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            sweep(tmp_path)
        os._exit(0)
    for _ in range(200):
        work, release = locked_folder(tmp_path, ".x-")
        (work / "file").write_text("mine")
        assert (work / "file").read_text() == "mine"
        release()
    os.waitpid(child, 0)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 2_000, 9_000, 20_000])
def test_files_that_may_not_grow(tmp_path: Path, size: int) -> None:
    """As on a disk that is full, but everywhere: the compiler fails, or our own writing does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    found = three_calls(limit, KVT_CACHE_DIR=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    COUNTS["limited files"] += 1
    assert found["right"], found
    assert len(found["warnings"]) == (0 if found["built"] else 1), found
    assert all(objects.is_whole(path) for path in (tmp_path / "cache" / "c").glob("*.so"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 kB, if this user can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(b"x" * (60 << 10))
    (tmp_path / "tmp").mkdir()
    found = three_calls(KVT_CACHE_DIR=str(small_disk / "cache"), TMPDIR=str(tmp_path / "tmp"))
    assert (found["right"], found["built"], len(found["warnings"])) == (True, True, 1), found
    assert not list(small_disk.glob("cache/c/*.so"))


def test_a_disk_that_runs_nothing(tmp_path: Path, small_disk: Path) -> None:
    command = ["mount", "-o", "remount,noexec,size=4m", small_disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be made noexec here")
    (tmp_path / "tmp").mkdir()
    found = three_calls(KVT_CACHE_DIR=str(small_disk / "cache"), TMPDIR=str(tmp_path / "tmp"))
    assert (found["right"], found["built"], len(found["warnings"])) == (True, True, 1), found
    assert "noexec" in found["warnings"][0]


def test_results_that_do_not_fit_leave_none_of_them(tmp_path: Path) -> None:
    def work() -> list[str]:
        store = Store(tmp_path / "tune")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        key = type(KEY).from_dict(KEY.to_dict() | {"part": "backward_q", "description": "x" * 5_000})
        large = Entry(key, {"rows": 16})
        try:
            store.save_all([Entry(KEY, {"rows": 16}), large])
        except OSError:
            return [str(path) for path in (tmp_path / "tune").rglob("*") if path.is_file()]
        return ["no error"]

    assert in_fork(work) == []


def test_a_file_that_is_written_again_is_whole(tmp_path: Path) -> None:
    write_own(tmp_path / "file", b"one")
    write_own(tmp_path / "file", b"another")
    assert (tmp_path / "file").read_bytes() == b"another"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
