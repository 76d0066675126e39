"""`make test-versions`: interpreters are looked up, what is missing is said, and the lists of versions agree."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import ROOT

from kvt_compile import torch_versions


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


versions, environment = tool("versions"), tool("environment")
HERE = "{}.{}".format(*sys.version_info)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_claimed_is_what_is_run() -> None:
    oldest, newest = (torch_versions.numbers(version.torch) for version in versions.VERSIONS)
    assert (oldest, newest) == (torch_versions.OLDEST, torch_versions.NEWEST)
    assert f"torch>={torch_versions.text(oldest)}" in PROJECT["dependencies"], (
        "no upper limit: a newer one is warned about"
    )
    claimed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")}
    assert claimed == {python for version in versions.VERSIONS for python in version.pythons}
    readme = (ROOT / "README.md").read_text()
    for version in versions.VERSIONS:
        assert f"torch {torch_versions.text(torch_versions.numbers(version.torch))}" in readme
        assert version.torch in environment.PARTNERS, "its torchvision and Triton"
    assert environment.TORCH in environment.PARTNERS


@pytest.mark.parametrize(
    ("torch", "fits"), [(None, False), ("2.10.1", False), ("2.11.0+cu130", True), ("2.14.1", True), ("3.0.0", True)]
)
def test_an_environment_is_taken_as_it_is_unless_its_torch_is_too_old(torch: str | None, fits: bool) -> None:
    assert environment.fits(torch) == fits


def test_the_first_python_that_is_there_is_taken() -> None:
    found = versions.interpreter(("2.6", HERE, "2.7"))
    assert found is not None
    assert found[0] == HERE
    assert versions.interpreter(("2.6",)) is None


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_shim_that_leads_nowhere_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pyenv puts `python3.12` on the PATH whether or not that version is chosen here; it knows where it is."""
    script(tmp_path / f"python{HERE}", "echo 'pyenv: command not found' >&2; exit 127")
    prefix = tmp_path / "real"
    (prefix / "bin").mkdir(parents=True)
    script(prefix / "bin" / "python", f'exec "{sys.executable}" "$@"')
    script(tmp_path / "pyenv", f'case "$1" in versions) echo {HERE}.0;; prefix) echo "{prefix}";; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    commands = list(versions.candidates(HERE))
    assert commands[:2] == [[str(tmp_path / f"python{HERE}")], [str(prefix / "bin" / "python")]]
    assert versions.usable(commands[0], HERE) is None
    assert versions.usable(commands[1], HERE) is not None


class TestRun:
    @pytest.fixture(autouse=True)
    def _nothing_is_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.ran: list[tuple[str, ...]] = []
        monkeypatch.setattr(versions, "FOLDER", tmp_path / "venvs")
        monkeypatch.setattr(versions, "environment", lambda version: Path(version.name))
        monkeypatch.setattr(versions, "run", lambda python, *rest: self.ran.append((str(python), *rest)) or 0)

    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["versions.py", *arguments])
        return int(versions.main())

    def suites(self) -> list[tuple[str, ...]]:
        return [command for command in self.ran if "pytest" in command]

    def test_both_unless_one_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.call(monkeypatch) == 0
        assert [command[0] for command in self.suites()] == ["oldest", "newest"]
        self.ran.clear()
        assert self.call(monkeypatch, "newest", "-k", "mT", "tests/finding") == 0
        ((name, *rest),) = self.suites()
        assert (name, rest[-3:]) == ("newest", ["-k", "mT", "tests/finding"])

    def test_rooms_that_can_change_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.call(monkeypatch, "--changing")
        rooms = [x for x in self.suites()[0] if x.startswith("tests/")]
        assert rooms == list(versions.CHANGING)
        assert all((ROOT / room).exists() for room in rooms)

    def test_a_failure_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "run", lambda python, *rest: int("pytest" in rest and python.name == "oldest"))
        assert self.call(monkeypatch) == 1

    def test_without_an_interpreter_it_says_which(self, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        monkeypatch.setattr(versions, "environment", lambda version: None)
        assert self.call(monkeypatch, "newest") == 1
        assert "NOT RUN: needs Python 3.13 or 3.12 or 3.11" in capfd.readouterr().err
        assert not self.ran

    def test_out_of_time_it_says_so_and_is_no_failure(self, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        assert self.call(monkeypatch, "--minutes", "-1") == 0
        assert capfd.readouterr().err.count("NOT RUN: no time was left") == 2
        assert not self.ran


def test_an_environment_of_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = versions.VERSIONS[0]
    monkeypatch.setenv("KVT_ENV_OLDEST", str(tmp_path))
    with pytest.raises(SystemExit, match="has no bin/python"):
        versions.environment(version)
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "python", "echo 1.0.0")
    with pytest.raises(SystemExit, match=f"has torch 1.0.0, expected {version.torch}"):
        versions.environment(version)
