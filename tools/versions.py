"""The oldest and the newest torch of torch_versions.py -> an environment for each, and the test suite run in it.

    python tools/versions.py [oldest | newest] [--changing] [--prepare] [--minutes M] [ARGUMENTS OF PYTEST]

    --changing   only the rooms whose outcome can depend on the version (CHANGING below)
    --prepare    make the environments and run nothing
    --minutes M  begin nothing once M minutes have passed; what was not run is said at the end, and is no failure

An environment lies in .venvs/oldest or .venvs/newest (about 5 GB each, most of it CUDA, as PyPI's wheels of torch are
built for it), or is the virtual environment that KVT_ENV_OLDEST or KVT_ENV_NEWEST names.  Its Python is looked up on
this machine: the first of the version's list that is there.  Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venvs"


@dataclass(frozen=True)
class Version:
    """A torch, and the Pythons it is tried with, the wanted one first; all of them are supported by it."""

    name: str
    torch: str
    pythons: tuple[str, ...]

    @property
    def given(self) -> str | None:
        return os.environ.get(f"KVT_ENV_{self.name.upper()}")


VERSIONS = (
    Version("oldest", "2.11.0", ("3.12", "3.11", "3.13")),
    Version("newest", "2.14.1", ("3.13", "3.12", "3.11")),
)
CHANGING = (
    *(
        "tests/capture",
        "tests/canonical",
        "tests/finding",
        "tests/reading",
        "tests/rewriting",
        "tests/op",
        "tests/triton",
        "tests/select",
        "tests/parallel",
        "tests/verification",
    ),
    *("tests/integrations", "tests/doctor", "tests/front/test_backend.py", "tests/front/test_rewrite.py"),
    *("tests/front/test_dynamic.py", "tests/front/test_functional.py"),
)
"""What torch, Triton, Python or transformers decide: capture, finding, rewriting, operators, kernels, ways in."""


def say(text: str) -> None:
    print(f"test-versions: {text}", file=sys.stderr, flush=True)


# ---- interpreters ----------------------------------------------------------------------------------------------------


def interpreter(wanted: Sequence[str]) -> tuple[str, str] | None:
    """(version, path) of the first of these Pythons that this machine has and that can make an environment."""
    for version in wanted:
        for command in candidates(version):
            if path := usable(command, version):
                return version, path
    return None


def candidates(version: str) -> Iterator[list[str]]:
    """Commands that may be this Python: on the PATH, then those that pyenv, uv and the py launcher know of."""
    if found := shutil.which(f"python{version}"):
        yield [found]
    for found in said(["pyenv", "versions", "--bare"]).splitlines():
        if found.strip().startswith(f"{version}.") and (prefix := said(["pyenv", "prefix", found.strip()])):
            yield [str(Path(prefix) / "bin" / "python")]
    if found := said(["uv", "python", "find", "--no-python-downloads", version]):
        yield [found]
    yield ["py", f"-{version}"]
    yield [sys.executable]


def said(command: Sequence[str]) -> str:
    """What a command prints, nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def usable(command: Sequence[str], version: str) -> str | None:
    """The path of the interpreter, if it is this version and has what makes environments."""
    check = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info)); print(sys.executable)"
    found = said([*command, "-c", check]).splitlines()
    return found[1] if len(found) == 2 and found[0] == version else None


# ---- environments ----------------------------------------------------------------------------------------------------


def environment(version: Version) -> Path | None:
    """The interpreter of the version's environment, which is made or completed; None where no Python can make it."""
    if version.given:
        python = Path(version.given) / "bin" / "python"
        if not python.exists():
            sys.exit(f"test-versions: KVT_ENV_{version.name.upper()} is {version.given}, which has no bin/python")
        return check_torch(version, python)
    folder = FOLDER / version.name
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{version.name}.lock").open("w") as lock:  # one prepares while another waits to run
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = folder / "bin" / "python"
        if not said([str(python), "-m", "pip", "--version"]):
            found = interpreter(version.pythons)
            if found is None:
                return None
            if found[0] != version.pythons[0]:
                say(f"no Python {version.pythons[0]} here: torch {version.torch} is tried on Python {found[0]} instead")
            say(f"making {folder.relative_to(ROOT)} with Python {found[0]}")
            subprocess.run([found[1], "-m", "venv", "--clear", folder], check=True, stdout=sys.stderr)
        if not torch_of(python).startswith(version.torch):
            free = shutil.disk_usage(folder).free / 1e9
            say(f"installing torch {version.torch} in {folder.relative_to(ROOT)} (about 5 GB; {free:.0f} GB are free)")
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, f"torch=={version.torch}", "setuptools>=77"], check=True, stdout=sys.stderr)
    return check_torch(version, python)


def check_torch(version: Version, python: Path) -> Path:
    found = torch_of(python)
    if not found.startswith(version.torch):
        sys.exit(f"test-versions: {python} has torch {found or '(none)'}, expected {version.torch}")
    return python


def torch_of(python: Path) -> str:
    return said([str(python), "-c", "from importlib.metadata import version; print(version('torch'))"])


def run(python: Path, *arguments: str) -> int:
    """Runs Python there with the project and its test dependencies, which tools/python adds where they are missing."""
    environ = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([ROOT / "tools" / "python", "test", *arguments], cwd=ROOT, env=environ).returncode


FACTS = (
    "import platform, torch, triton; "
    "print('Python', platform.python_version() + ', torch', torch.__version__ + ', Triton', triton.__version__)"
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-versions ARGS=...", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changing", action="store_true", help="only the rooms that a version can change")
    parser.add_argument("--prepare", action="store_true", help="make the environments and run nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many minutes")
    options, rest = parser.parse_known_args()
    names = [version.name for version in VERSIONS]
    chosen = [version for version in VERSIONS if version.name in rest] or list(VERSIONS)
    arguments = [x for x in rest if x not in names]
    started, results = time.monotonic(), []
    for version in chosen:
        label = f"{version.name} (torch {version.torch})"
        if time.monotonic() - started > 60 * options.minutes:
            results.append((label, "NOT RUN: no time was left", 0))
            continue
        python = environment(version)
        if python is None:
            needed = " or ".join(version.pythons)
            results.append((label, f"NOT RUN: needs Python {needed} with its venv module, and none was found", 1))
            continue
        if code := run(python, "-c", FACTS):
            results.append((label, "NOT RUN: its environment could not be completed", code))
        elif not options.prepare:
            room = list(CHANGING) if options.changing else []
            say(f"{label}: {'what a version can change' if room else 'the whole suite'}")
            code = run(python, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", *room, *arguments)
            results.append((label, "passed" if code == 0 else f"FAILED (exit code {code})", code))
    for label, outcome, _ in results:
        say(f"{label}: {outcome}")
    return int(any(code for _, _, code in results))


if __name__ == "__main__":
    sys.exit(main())
