"""A compiler that fails, hangs, lies or is not there: the right result, one warning, and no second try."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from faults import (  # noqa: F401 - fresh_lowering serves every test here
    BODIES,
    COUNTS,
    REAL,
    SPEC,
    X,
    become,
    compiler,
    everybodys_folder,
    fresh,
    fresh_lowering,
    mode,
    needs_root,
    runs,
    softmax,
    three_calls,
)  # fmt: skip

from kvt_compile.doctor import examine
from kvt_compile.kernels.c import CLowering, Settings, toolchain
from kvt_compile.kernels.c.running import run
from kvt_compile.kernels.c.toolchain import BuildError, find_compiler
from kvt_compile.kernels.op.spec import SoftmaxSpec

NO_OPENMP = 'for a in "$@"; do [ "$a" = -fopenmp ] && { echo "library not found" >&2; exit 1; }; done; ' + REAL


@pytest.mark.parametrize("fault", BODIES)
def test_it_is_tried_in_one_call_and_told_once(tmp_path: Path, fault: str) -> None:
    lowering = CLowering(Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", BODIES[fault]))))
    with pytest.warns(RuntimeWarning) as caught:
        assert softmax(lowering)
    COUNTS["compilers that fail"] += 1
    tried = runs(tmp_path / "bin")
    assert 1 <= tried <= 5
    for _ in range(4):
        assert softmax(lowering)
        lowering.softmax_backward(X, X, 1, torch.float32)
        assert not lowering.built(SoftmaxSpec("float64", "float64"))  # another kernel of the same compiler
    # what builds, but cannot be loaded, is another matter for each kernel
    assert runs(tmp_path / "bin") - tried <= (2 if fault == "writes what is no object" else 0)
    assert len(caught) == 1
    assert "kvt doctor" in str(caught[0].message)


def test_also_where_warnings_are_errors(tmp_path: Path) -> None:
    lowering = CLowering(Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", BODIES["fails"]))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            assert softmax(lowering)
        tried = runs(tmp_path / "bin")
        assert softmax(lowering)
    assert runs(tmp_path / "bin") == tried


@pytest.mark.parametrize("body", ["sleep 1000", "sleep 1000 & wait", "trap '' TERM INT; while :; do sleep 1; done"])
def test_a_compiler_that_hangs_is_stopped_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    assert toolchain.LIMIT_S <= 60
    monkeypatch.setattr(toolchain, "LIMIT_S", 0.5)
    lowering = CLowering(Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", body))))
    with pytest.warns(RuntimeWarning, match=r"took longer than .* and is not run again") as caught:
        assert all([softmax(lowering) for _ in range(3)])
    assert (runs(tmp_path / "bin"), len(caught)) == (1, 1)
    assert toolchain.given_up()


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    script = compiler(tmp_path, f"(sleep 1; echo late > {tmp_path}/late) & sleep 1000")
    with pytest.raises(TimeoutError):
        run([str(script)], 0.3)
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


def test_doctor_says_what_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvt_compile.kernels.c.lowering.LOWERING._settings",
        Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", BODIES["fails"]))),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [check for check in examine().checks if check.name == "given up"]
    assert len(found) == 1
    assert "program of ten lines" in found[0].text
    assert "CC" in found[0].remedy


# --- what it can do ---------------------------------------------------------------------------------------------------


def threads_of(cache: Path) -> list[bool]:
    """For each kernel in a cache whether it has several threads."""
    return [b"GOMP_parallel" in x.read_bytes() or b"__kmpc" in x.read_bytes() for x in (cache / "c").glob("*.so")]


@pytest.mark.parametrize("times", [1, 2])
def test_a_moment_of_weakness_is_not_kept(tmp_path: Path, times: int) -> None:
    """It fails at first and speaks of "compilation"."""
    count = f'if [ $(wc -l < {tmp_path}/bin/runs) -le {times} ]; then echo "compilation terminated" >&2; exit 1; fi; '
    lowering = CLowering(Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", count + REAL))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert softmax(lowering)
    fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax(lowering)
    assert True in threads_of(tmp_path / "cache")
    assert lowering.built(SPEC)


def test_a_compiler_without_openmp_builds_kernels_of_one_thread_and_says_so(tmp_path: Path) -> None:
    lowering = CLowering(Settings(tmp_path / "cache", str(compiler(tmp_path / "bin", NO_OPENMP))))
    with pytest.warns(RuntimeWarning, match="run on one thread") as caught:
        assert softmax(lowering)
    assert len(caught) == 1
    assert threads_of(tmp_path / "cache") == [False]
    # with OpenMP installed, though the compiler is the same file, they are built anew
    before = (tmp_path / "bin" / "compiler").stat()
    text = (tmp_path / "bin" / "compiler").read_text().replace("exit 1; }", "true  ; }")
    (tmp_path / "bin" / "compiler").write_text(text)
    os.utime(tmp_path / "bin" / "compiler", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / "bin" / "compiler").stat().st_size == before.st_size
    fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax(lowering)
    assert sorted(threads_of(tmp_path / "cache")) == [False, True]


def test_a_folder_named_omp_is_no_reason(tmp_path: Path) -> None:
    """What the compiler says holds the name of the folder."""
    body = "echo $PWD-omp-fopenmp >&2; exit 1"
    with pytest.raises(BuildError):
        find_compiler(str(compiler(tmp_path / "omp", body)), "native").probed()


# --- finding one ------------------------------------------------------------------------------------------------------

FINDING: dict[str, dict[str, str | None]] = {
    "an unbalanced quote": {"CC": 'gcc "-O2'},
    "a backslash at the end": {"CC": "gcc \\"},
    "only spaces": {"CC": "   "},
    "a folder": {"CC": "/tmp"},
    "a name in another encoding": {"CC": os.fsdecode(b"/no/such/\xfc")},
    "nothing on the path": {"PATH": "/nowhere"},
    "an unknown instruction set": {"KVT_CPU": "avx1024"},
    "a flag it does not know": {"CC": "gcc --no-such-flag"},
}


@pytest.mark.parametrize("fault", FINDING)
def test_no_compiler_leaves_a_lowering_that_works(tmp_path: Path, fault: str) -> None:
    found = three_calls(KVT_CACHE_DIR=str(tmp_path / "cache"), **FINDING[fault])
    assert (found["right"], found["built"], len(found["warnings"])) == (True, False, 1), found


PLACES: dict[str, dict[str, str | None]] = {
    "a user that is not": {"KVT_CACHE_DIR": "~nosuchuser/kvt"},
    "a relative folder that looks like an option": {"KVT_CACHE_DIR": "-ox"},
    "a relative folder that looks like a file of options": {"KVT_CACHE_DIR": "@x"},
    "a device": {"KVT_CACHE_DIR": "/dev/null"},
    "a file system of the kernel's": {"KVT_CACHE_DIR": "/proc/self/kvt"},
    "bytes that are no text": {"KVT_CACHE_DIR": os.fsdecode(b"\xfc\xff")},
    "a line break": {"KVT_CACHE_DIR": "a\nb"},
}


@pytest.mark.parametrize("fault", PLACES)
def test_a_strange_place_for_the_cache_still_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = three_calls(**PLACES[fault])
    assert (found["right"], found["built"]) == (True, True), found
    assert len(found["warnings"]) <= 1


def test_no_home_directory() -> None:
    """Of a user that has no entry anywhere."""
    needs_root()
    with everybodys_folder() as folder:
        found = three_calls(
            lambda: become(54321), HOME=None, KVT_CACHE_DIR=None, XDG_CACHE_HOME=None, TMPDIR=str(folder)
        )
        assert (found["right"], found["built"], len(found["warnings"])) == (True, True, 1), found
        assert "no folder for its cache" in found["warnings"][0]
        assert mode(folder / "kvt_compile-54321") == 0o700


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()

    def leave() -> None:
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    found = three_calls(leave, KVT_CACHE_DIR="relative")
    assert (found["right"], len(found["warnings"])) == (True, 1), found
