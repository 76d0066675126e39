"""This machine -> an environment that runs the project; prints its interpreter, and on stderr what was done.

    python tools/environment.py EXTRA        EXTRA: examples | test | docs | dev, as in pyproject.toml

Two cases:
  as it is   the running interpreter is in an activated virtualenv or conda environment (or was named by PYTHON=...)
             that has a fitting torch: only distributions that are missing are added, nothing there changes version;
  our own    otherwise .venv is made beside pyproject.toml: torch first, then torchvision without its dependencies
             (it must never pull another torch), then the rest with torch's version as a constraint.
Standard library only.  Nothing is done, in a few milliseconds, when a stamp says that everything is in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = ROOT / ".setup"
TORCH = "2.13.0"
# torch -> what is built for exactly it: (torchvision, triton), from the metadata of their wheels
PARTNERS = {
    "2.11.0": ("0.26.0", "3.6.0"),
    "2.12.0": ("0.27.0", "3.7.0"),
    "2.12.1": ("0.27.1", "3.7.1"),
    TORCH: ("0.28.0", "3.7.1"),
    "2.14.0": ("0.29.0", "3.8.0"),
    "2.14.1": ("0.29.1", "3.8.0"),
}


def say(text: str) -> None:
    print(f"set-up: {text}", file=sys.stderr, flush=True)


def fits(torch: str | None) -> bool:
    """Whether a version of torch is one the project supports (pyproject.toml: torch>=2.11)."""
    return torch is not None and tuple(int(x) for x in re.findall(r"\d+", torch)[:2]) >= (2, 11)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name -> version of every distribution the running interpreter sees."""
    return {normal(d.name): d.version for d in metadata.distributions() if d.name}


def requirements(extra: str) -> Iterator[str]:
    """Every requirement of the project with an extra, extras of our own resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["dependencies"]
    waiting = [extra]
    while waiting:
        for line in project["optional-dependencies"][waiting.pop()]:
            if ours := re.match(rf"{project['name']}\[(.*)\]", line):
                waiting += re.split(r"\s*,\s*", ours[1])
            else:
                yield line


def pip(python: Path, *arguments: str, constraints: dict[str, str] | None = None, watch: bool = False) -> None:
    """Runs pip; where it fails, shows what it said and stops.  `watch` shows its progress to a person at a terminal."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in (constraints or {}).items()))
        file.flush()
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
        shown = sys.stderr if watch and sys.stderr.isatty() else subprocess.PIPE
        done = subprocess.run(
            [*command, "-c", file.name],
            stdout=shown,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PIP_ROOT_USER_ACTION": "ignore"},
        )
    if done.returncode:
        print(done.stdout or "", file=sys.stderr)
        say(f"failed at: {' '.join(command)}")
        sys.exit("set-up: pip's message above says why; the same make command goes on from here")


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def make_own() -> None:
    """Makes or completes .venv."""
    python = VENV / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, stdout=sys.stderr)
    have = facts(python)["distributions"]
    if not fits(have.get("torch")):
        say(f"installing torch {TORCH} (the largest part)")
        # a CPU build is taken where one is offered, but not on a machine with a GPU
        pip(python, f"torch=={TORCH}" + (f",!={TORCH}+cpu" if has_nvidia_gpu() else ""), watch=True)
        have = facts(python)["distributions"]
    pinned = pair_torchvision(python, have)
    say("installing the project and its development tools")
    pip(python, "--no-build-isolation", "-e", ".[dev]", constraints=pinned)


def use_as_it_is(extra: str) -> None:
    """Adds to the running environment what the extra lacks there."""
    python, have = Path(sys.executable), installed()
    if "pip" not in have:
        subprocess.run([python, "-m", "ensurepip"], check=True, stdout=sys.stderr)
    wanted = {normal(re.match(r"[\w.-]+", line)[0]): line for line in [*requirements(extra), "setuptools>=77"]}  # type: ignore[index]
    missing = {name: line for name, line in wanted.items() if name not in have}
    if missing:
        say(f"adding to {sys.prefix}: {', '.join(missing)}")
        if missing.pop("torchvision", None):
            have |= pair_torchvision(python, have)
        pip(python, *missing.values(), constraints=partners(have) | have)
    say(f"registering the project in {sys.prefix}")
    pip(python, "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")


def partners(have: dict[str, str]) -> dict[str, str]:
    """Constraints that keep torch as it is and its partners at the versions built for it."""
    pinned = {"torch": have["torch"]}
    if pair := PARTNERS.get(have["torch"].split("+")[0]):
        pinned |= dict(zip(("torchvision", "triton"), pair, strict=True))
    return pinned


def pair_torchvision(python: Path, have: dict[str, str]) -> dict[str, str]:
    """Puts torchvision beside torch where it is missing; returns the constraints to go on with."""
    pinned = partners(have)
    if "torchvision" not in have:
        version = pinned.get("torchvision")
        pip(python, "--no-deps", f"torchvision=={version}" if version else "torchvision")
    return pinned


def facts(python: Path) -> dict[str, dict[str, str]]:
    return json.loads(subprocess.check_output([python, __file__, "--facts"], text=True))


def warn_of_gaps() -> None:
    """Says what torch.compile on a CPU will miss later, with a message much less plain."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        say("no C++ compiler found: torch.compile on a CPU needs one (Debian: g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        say("Python.h not found: torch.compile on a CPU needs Python's headers (Debian: python3-dev)")


class Stamp:
    """Remembers that an extra was installed, until pyproject.toml, this file or the installed packages change."""

    def __init__(self, prefix: str, extra: str) -> None:
        told = [prefix, extra, sys.version, (ROOT / "pyproject.toml").read_text(), Path(__file__).read_text()]
        self.file = STAMPS / hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]

    def holds(self) -> bool:
        try:
            folder, changed = self.file.read_text().splitlines()
            return str(Path(folder).stat().st_mtime_ns) == changed
        except (OSError, ValueError):
            return False

    def write(self, packages: Path) -> None:
        """`packages` is the site-packages folder: its time changes whenever something is installed or removed."""
        self.file.write_text(f"{packages}\n{packages.stat().st_mtime_ns}\n")


def main(extra: str) -> None:
    isolated = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").exists() or "PYTHON" in os.environ
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    own = not (isolated and fits(torch)) or Path(sys.prefix).resolve() == VENV
    prefix, extra = (str(VENV), "dev") if own else (sys.prefix, extra)
    stamp = Stamp(prefix, extra)
    if not stamp.holds():
        STAMPS.mkdir(exist_ok=True)
        with (STAMPS / "lock").open("w") as lock:  # two makes at once: the second waits and finds the first's work
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stamp.holds():
                warn_of_gaps()
                make_own() if own else use_as_it_is(extra)
                stamp.write(Path(facts(VENV / "bin" / "python")["site"] if own else sysconfig.get_path("purelib")))
                say("ready")
    print(VENV / "bin" / "python" if own else sys.executable)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--facts"]:
            print(json.dumps({"distributions": installed(), "site": sysconfig.get_path("purelib")}))
        case ["examples" | "test" | "docs" | "dev" as extra]:
            main(extra)
        case _:
            sys.exit(__doc__)
