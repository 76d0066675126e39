"""What tests of faults share: compilers that misbehave, a process of its own, another user.

`make faults` sets KVT_FAULTS to how many times as much it does than CI.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvt_compile.kernels.c import CLowering, cache, launch, source, toolchain
from kvt_compile.kernels.c import lowering as c_lowering
from kvt_compile.kernels.op import lowerings, ready
from kvt_compile.kernels.op.spec import SoftmaxSpec
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.warn import warn_once

SCALE = int(os.environ.get("KVT_FAULTS", "1"))
"""1 in CI."""
OTHER_USER = 65534
"""Nobody."""
COUNTS: Counter[str] = Counter()
"""What was done, for the last line of `make faults`."""

COMPILER = """#!/bin/sh
echo run >> {log}
{body}
"""
REAL = 'exec cc "$@"'
BODIES = {
    "fails": "echo 'cc1: internal compiler error: compilation terminated' >&2; exit 1",
    "is killed": "kill -9 $$",
    "says yes and writes nothing": "exit 0",
    "writes what is no object": """while [ "$1" != -o ]; do shift; done; echo text > "$2" """,
    "makes every warning an error": 'echo "x.c:1: error: unused [-Werror]" >&2; exit 1',
    "prints latin-1": "printf 'Fehler: ung\\374ltig' >&2; exit 1",
    "prints without end": "yes nonsense | head -c 3000000 >&2; exit 1",
    "reads its input": "cat > /dev/null; exit 1",
}

X = torch.linspace(-3, 5, 120).view(4, 30).sin()
SPEC = SoftmaxSpec("float32", "float32")
"""Of the row kernel, which is the quickest to build."""


def fresh() -> None:
    """The C lowering as in a new process."""
    launch.kernel.cache_clear()
    lowerings.choose.cache_clear()
    ready.forget()
    c_lowering._no_compiler.cache_clear()
    cache._temporary_folder.cache_clear()
    warn_once.cache_clear()
    toolchain.forget()


@pytest.fixture(autouse=True)
def fresh_lowering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A temporary folder and a memory of the lowering of its own, for every test of a file that imports this."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    fresh()
    yield
    fresh()


def compiler(folder: Path, body: str) -> Path:
    """A C compiler that does as `body` says and counts its runs in `runs` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compiler"
    path.write_text(COMPILER.format(log=folder / "runs", body=body))
    path.chmod(0o755)
    return path


def runs(folder: Path) -> int:
    """How often that compiler was run."""
    file = folder / "runs"
    return len(file.read_text().split()) if file.exists() else 0


def softmax(lowering: CLowering) -> bool:
    """Whether a call gives the right result."""
    expected = aten.LOWERING.softmax(X, 1, 3, torch.float32)
    return torch.allclose(lowering.softmax(X, 1, 3, torch.float32), expected)


def in_fork(work: Callable[[], Any], **environment: str | None) -> Any:
    """What `work` returns, as JSON, in a fork with other variables; None unsets.  A failure there is one here."""
    source(SPEC)  # another user may not be able to read the templates
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            tempfile.tempdir = None
            torch.set_num_threads(1)
            fresh()
            text = json.dumps(work())
        except BaseException:
            text = json.dumps({"failed": traceback.format_exc()})
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    COUNTS["processes"] += 1
    found = json.loads(text or "null")
    assert not (isinstance(found, dict) and "failed" in found), found["failed"]
    return found


def three_calls(before: Callable[[], None] | None = None, **environment: str | None) -> dict[str, Any]:
    """Three calls in a fork: whether they were right, whether the kernel was built, and what was said; `before` runs
    there first (a limit, another user)."""

    def work() -> dict[str, Any]:
        if before is not None:
            before()
        lowering = CLowering()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            right = all([softmax(lowering) for _ in range(3)])
            said = [str(w.message) for w in caught]
            return {"right": right, "built": lowering.built(SPEC), "warnings": said}

    found: dict[str, Any] = in_fork(work, **environment)
    return found


@contextmanager
def everybodys_folder() -> Iterator[Path]:
    """A folder such as /tmp, that other users can reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def become(user: int) -> None:
    """In a fork, for good."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def needs_root() -> None:
    """Skips where files cannot be given to another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
