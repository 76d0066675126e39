"""The repository itself: what is packaged, what may import what, that pages and scripts say what is so."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from places import ROOT
from setuptools import find_packages

PACKAGE = ROOT / "kvt_compile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def python(code: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def sources() -> Iterator[Path]:
    for folder in ("kvt_compile", "tests", "examples", "tools", "docs", "benchmarks", ".ci"):
        yield from (
            path for path in sorted((ROOT / folder).rglob("*")) if path.is_file() and path.suffix not in (".pyc", ".so")
        )
    yield from (path for path in sorted(ROOT.iterdir()) if path.is_file() and path.name not in ("LICENSE", ".git"))


def text(path: Path) -> str:
    return path.read_text(errors="replace")


class TestPackage:
    def test_backend_needs_no_import_of_ours(self) -> None:
        """The entry point: torch knows the name before anything of ours is imported."""
        done = python(
            "import sys, torch; names = torch._dynamo.list_backends();"
            "assert 'kvt' in names, names; assert 'kvt_compile' not in sys.modules"
        )
        assert done.returncode == 0, done.stderr
        (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="kvt")
        assert callable(entry.load())

    def test_only_our_name_is_packaged(self) -> None:
        found = find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
        assert found
        assert all(name == "kvt_compile" or name.startswith("kvt_compile.") for name in found)

    def test_every_folder_of_python_is_a_package(self) -> None:
        folders = {path.parent for path in PACKAGE.rglob("*.py")}
        assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []

    @pytest.mark.parametrize("door", ["passes", "kernels"])
    def test_doors_at_the_top_are_links(self, door: str) -> None:
        assert (ROOT / door).is_symlink()
        assert (ROOT / door).resolve() == (PACKAGE / door).resolve()

    def test_typed(self) -> None:
        assert (PACKAGE / "py.typed").is_file()

    def test_a_source_distribution_holds_docs_and_examples(self, tmp_path: Path) -> None:
        """All that git has, but for the links, which an archive of a package would hold as copies."""
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode != 0:
            pytest.skip("not in a git checkout")
        files = [name for name in listed.stdout.split() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]
        for name in files:
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "copy" / name)
        code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path / "copy", capture_output=True)
        assert done.returncode == 0, done.stderr
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            held = {name.partition("/")[2] for name in tar.getnames()}
        assert set(files) - held == {".gitignore"}
        assert {"docs/index.md", "examples/quickstart.py"} <= held

    def test_version_is_told_once(self) -> None:
        version = PROJECT["project"]["version"]
        assert metadata.version("kvt-compile") == version
        newest = re.search(r"^## (\d+\.\d+\.\d+)", text(ROOT / "CHANGELOG.md"), re.M)
        assert newest
        assert newest[1] == version


class TestImports:
    """Each in a fresh process, so that nothing imported by another test helps."""

    def test_nothing_is_imported_from_a_conftest(self) -> None:
        """There are several, and which of them has the name depends on what is collected first."""
        importers = [
            str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if "conftest" in imported(path)
        ]
        assert importers == []

    def test_every_module_imports_without_triton(self) -> None:
        names = [
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in sorted(PACKAGE.rglob("*.py"))
            if path.name != "__main__.py"
        ]
        assert "kvt_compile.report.report" in names
        code = (
            f"import importlib, sys; sys.modules['triton'] = None\nfor name in {names}: importlib.import_module(name)"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("layer", ["kernels", "passes"])
    def test_lower_layers_stand_alone(self, layer: str) -> None:
        """No import statement, at any depth, of what is above."""
        above = {
            "kernels": ("passes", "cli", "backend", "rewrite", "explain", "capture", "config", "report", "functional")
        }
        above["passes"] = above["kernels"][1:]
        for path in (PACKAGE / layer).rglob("*.py"):
            for name in imported(path):
                assert not name.startswith(tuple(f"kvt_compile.{top}" for top in above[layer])), (
                    f"{path} imports {name}"
                )

    @pytest.mark.parametrize(
        "library", ["rich", "typer", "jinja2", "timm", "transformers", "torchvision", "numpy.testing", "matplotlib"]
    )
    def test_what_is_for_people_is_not_imported_by_the_library(self, library: str) -> None:
        done = python(
            "import sys, torch; before = set(sys.modules); import kvt_compile;"
            f"assert {library!r} not in set(sys.modules) - before"
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("library", ["torch._dynamo", "torch.distributed.tensor"])
    def test_what_takes_seconds_is_not_imported_with_the_library(self, library: str) -> None:
        done = python(f"import sys, torch, kvt_compile; assert {library!r} not in sys.modules")
        assert done.returncode == 0, done.stderr

    def test_no_print_in_the_library(self) -> None:
        calls = [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for path in sorted(PACKAGE.rglob("*.py"))
            for node in ast.walk(ast.parse(text(path)))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert calls == []


def _paths(words: str) -> Iterator[str]:
    """What stands there as a path into this repository, `*` and `{a,b}` aside."""
    rooms = "kvt_compile|passes|kernels|tests|benchmarks|examples|tools|docs|report|canonical|reading|finding|op"
    yield from re.findall(rf"(?<![\w/.:@-])(?:{rooms})/[\w./*-]*[\w*/](?![\w{{}}])", words)


def _is_there(parent: Path, name: str) -> bool:
    return any(True for _ in parent.glob(name)) if "*" in name else (parent / name).exists()


def _is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(text(path))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = ".".join(package[: -node.level]) if node.level else ""
                source = ".".join(part for part in (base, node.module) if part)
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)


class TestPages:
    def test_license(self) -> None:
        assert text(ROOT / "LICENSE").split("\n", 3)[1].strip() == "Apache License"
        assert PROJECT["project"]["license"] == "Apache-2.0"

    def test_make_targets_named_in_pages_exist(self) -> None:
        targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M))
        assert {"help", "demo", "test", "check", "bench"} <= targets
        for page in PAGES:
            named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text(page), re.M))
            assert named <= targets, f"{page.name} names {named - targets}"

    def test_files_named_in_pages_exist(self) -> None:
        for page in PAGES:
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page)):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"

    def test_every_path_that_is_named_exists(self) -> None:
        """In pages and in docstrings: folders and files, as they stand from the top or from a room's own parent."""
        wrong = [
            f"{path.relative_to(ROOT)}: {name}"
            for path in [*PAGES, *sorted(PACKAGE.rglob("*.py"))]
            if path.name != "CHANGELOG.md"
            for name in _paths(text(path))
            if not any(
                _is_there(parent, name)
                for parent in (ROOT, PACKAGE, PACKAGE / "passes", PACKAGE / "kernels", path.parent)
            )
        ]
        assert wrong == []

    @pytest.mark.parametrize(
        ("line", "names"),
        [
            ("see `passes/canonical/` and tests/helpers/texts.py.", ["passes/canonical/", "tests/helpers/texts.py"]),
            ("timm/layers/attention.py:98 is no file of ours", []),
            ("`meaning*.py` beside https://host/docs/x.md", []),
            ("kernels/gone.py", ["kernels/gone.py"]),
        ],
    )
    def test_what_is_taken_for_a_path(self, line: str, names: list[str]) -> None:
        assert list(_paths(line)) == names

    def test_every_module_that_a_page_names_exists(self) -> None:
        code = "".join(text(path) for path in PACKAGE.rglob("*.py"))
        loggers = set(re.findall(r'getLogger\("([\w.]+)"\)', code))
        for page in PAGES:
            if page.name == "CHANGELOG.md":
                continue
            for name in set(re.findall(r"\bkvt_compile(?:\.\w+)+", text(page))) - loggers:
                parts = name.split(".")
                at = next(n for n in range(len(parts), 0, -1) if _is_module(parts[:n]))
                found = importlib.import_module(".".join(parts[:at]))
                for part in parts[at:]:
                    assert hasattr(found, part), f"{page.name} names {name}"
                    found = getattr(found, part)

    def test_a_name_and_its_file_go_together(self) -> None:
        """`NAME` (`path`) in a page: the file has the name."""
        pair = re.compile(r"`(\w+)` \(`(kvt_compile/[\w/]+\.py)`\)")
        pairs = [(page, *found) for page in PAGES for found in pair.findall(text(page))]
        assert pairs
        for page, name, path in pairs:
            there = re.search(rf"^(?:def |class )?{name}\b", text(ROOT / path), re.M)
            assert there, f"{page.name}: no {name} in {path}"

    def test_readme_lists_every_option_with_its_default(self) -> None:
        from kvt_compile.config import Options

        readme = text(ROOT / "README.md")
        for name, default in vars(Options()).items():
            row = re.search(rf"^\| `{name}` \| `([^`]*)` \|", readme, re.M)
            assert row, f"README's table of options has no row for {name}"
            assert row[1] == repr(default).replace("'", '"')

    def test_code_in_the_readme_is_python(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", text(ROOT / "README.md"), re.S)
        assert blocks
        for block in blocks:
            ast.parse(block)

    def test_ci_runs_the_readmes_test_command(self) -> None:
        assert "make test" in text(ROOT / ".ci/run").splitlines()
        assert re.search(r"^    make test\b", text(ROOT / "README.md"), re.M)

    def test_nothing_of_one_machine_is_in_the_repository(self) -> None:
        hosts = ("index" + "-url", "find" + "-links", "trusted" + "-host")
        folders = re.compile(r"(?<![\w.])/(?:home|root|opt|work|Users)/")
        for path in sources():
            if path == Path(__file__):
                continue
            for word in hosts:
                assert word not in text(path), f"{path} names a package index"
            assert not folders.search(text(path)), f"{path} names a folder of one machine"

    def test_no_long_files(self) -> None:
        done = subprocess.run([sys.executable, ROOT / "tools/long_files.py"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
