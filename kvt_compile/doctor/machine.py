"""Facts about this machine, each as text a person can paste into a bug report."""

from __future__ import annotations

import platform
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from kvt_compile.kernels.c.objects import unfinished
from kvt_compile.kernels.c.running import run
from kvt_compile.kernels.c.settings import Settings, from_environment
from kvt_compile.kernels.c.toolchain import BuildError, find_compiler
from kvt_compile.kernels.disk.trust import UntrustedError, own_folder
from kvt_compile.kernels.disk.write import private_folder
from kvt_compile.kernels.tune.store import Store


def versions() -> dict[str, str]:
    """kvt_compile, Python, torch, triton and the system."""
    return {
        "kvt_compile": version("kvt-compile"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def backend_is_registered() -> bool:
    """Whether `torch.compile(backend="kvt")` finds us without an import."""
    return any(x.value.startswith("kvt_compile.") for x in entry_points(group="torch_dynamo_backends", name="kvt"))


@dataclass(frozen=True)
class CompilerFacts:
    """The C compiler of the lowering "c"; `missing` says why there is none."""

    command: str = ""
    version: str = ""
    target: str = ""
    missing: str = ""


def compiler(settings: Settings | None = None) -> CompilerFacts:
    """The compiler that kernels would be built with."""
    settings = settings or from_environment()
    try:
        found = find_compiler(settings.compiler, settings.target)
    except BuildError as error:
        return CompilerFacts(target=settings.target, missing=str(error))
    try:
        said = run([*found.command, "--version"], 30)[1].splitlines()
    except (OSError, ValueError):
        said = []
    return CompilerFacts(shlex.join(found.command), said[0] if said else "", found.target)


def cpu() -> str:
    """Name, vector instructions as torch sees them, threads."""
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """One line for each GPU; empty where there is none."""
    if not torch.cuda.is_available():
        return []
    lines = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        lines.append(f"{facts.name}, capability {facts.major}.{facts.minor}, {facts.total_memory / 1e9:.0f} GB")
    return lines


@dataclass(frozen=True)
class CacheFacts:
    """The folder built kernels are kept in."""

    folder: str
    writable: bool
    files: int
    size: int
    """Bytes."""
    reason: str = ""
    """Why it cannot be written."""
    untrusted: str = ""
    """Why nothing is loaded from it, and what to do."""
    leftovers: int = 0
    """Folders of processes that were killed."""


def cache(settings: Settings | None = None) -> CacheFacts:
    """Tries to write; leaves nothing behind but the folder itself, which a build would make as well."""
    folder = (settings or from_environment()).cache
    reason = untrusted = ""
    try:
        private_folder(folder)
        for part in (folder, folder / "c", folder / "tune"):
            if part.exists():
                own_folder(part, folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"kvt")
    except UntrustedError as error:
        untrusted = str(error)
    except OSError as error:
        reason = f"{type(error).__name__}: {error.strerror or error}"
    sizes = []
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
        except OSError:  # another process cleans up
            continue
    left = [*unfinished(folder), *Store(folder / "tune").unfinished()]
    return CacheFacts(str(folder), not reason, len(sizes), sum(sizes), reason, untrusted, len(left))


def free_space(folder: str) -> int | None:
    """Bytes left on the disk of a folder, or of the nearest one above it that exists."""
    path = Path(folder)
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
