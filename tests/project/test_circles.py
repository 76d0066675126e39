"""`make check` fails when a circle of imports is made: each kind of circle, made in a copy of the code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("importlinter")

COMMAND = "from importlinter.cli import lint_imports_command as check; check()"
LAZY = "\n\ndef _later():\n    import {0}\n\n    return {0}\n"
TYPES = "\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import {0}\n"
PLAIN = "\n\nimport {0}\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("kvt_compile", "benchmarks", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def checked(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--no-logo"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_make_check_runs_it() -> None:
    assert COMMAND in (ROOT / "Makefile").read_text()


def test_the_code_as_it_is_has_none(copy: Path) -> None:
    code, said = checked(copy)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "imports", "how"),
    [
        pytest.param("report/diff.py", "kvt_compile.report.graphs", LAZY, id="inside-a-function"),
        pytest.param("calibration/facts.py", "kvt_compile.calibration.policy", TYPES, id="for-types-alone"),
        pytest.param("kernels/tune/entry.py", "kvt_compile.kernels.tune.store", PLAIN, id="deep-in-a-package"),
        pytest.param("report/page/cost.py", "kvt_compile.report.page.build", LAZY, id="in-a-package-of-a-package"),
        pytest.param("kernels/language/grid.py", "kvt_compile.kernels.op.spec", LAZY, id="between-packages"),
        pytest.param("kernels/op/call.py", "kvt_compile.kernels", LAZY, id="through-a-package's-own-file"),
        pytest.param("../benchmarks/zoo/tiny.py", "benchmarks.zoo.transformers_models", LAZY, id="in-the-zoo"),
    ],
)
def test_a_circle_is_an_error(copy: Path, file: str, imports: str, how: str) -> None:
    path = copy / "kvt_compile" / file
    before = path.read_text()
    path.write_text(before + how.format(imports))
    try:
        code, said = checked(copy)
    finally:
        path.write_text(before)
    assert code == 1, said
    broken = [line for line in said.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith("no circle") for line in broken), said


def test_an_import_that_closes_no_circle_is_none(copy: Path) -> None:
    path = copy / "kvt_compile/report/page/cost.py"
    before = path.read_text()
    path.write_text(before + LAZY.format("kvt_compile.report.names"))
    try:
        code, said = checked(copy)
    finally:
        path.write_text(before)
    assert code == 0, said
