"""C source -> shared object: finds the compiler, knows its flags, runs it."""

from __future__ import annotations

import hashlib
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FLAGS = (
    "-std=gnu11",
    "-O2",
    "-ftree-vectorize",
    # without it GCC keeps the sums of sum_kept in memory; the rest of -O3 costs up to 2 s a kernel and gains nothing
    "-fpeel-loops",
    "-fPIC",
    "-shared",
    "-ffp-contract=fast",  # multiply-add in one instruction; everything else stays IEEE: no -ffast-math
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",  # index arithmetic of a score text may leave 64 bits: it wraps, and is clamped afterwards
    "-fno-strict-aliasing",  # vectors are read from arrays of their elements
    "-Wno-psabi",
)
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "native": ("-march=native",),
        "avx512": ("-march=skylake-avx512",),
        "avx2": ("-march=haswell",),
        "portable": ("-march=x86-64",),
    },
    "aarch64": {"native": ("-mcpu=native",), "portable": ()},
}
"""Machine -> name of an instruction set -> flags.  The source is the same for all."""
INSTALL_HINT = "install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; conda: conda install c-compiler)"


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message holds the first lines of what it said."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler and the flags of one instruction set."""

    command: tuple[str, ...]
    target: str
    flags: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Changes whenever the same source might give another object: compiler, flags, the CPU when it is native."""
        executable = Path(shutil.which(self.command[0]) or self.command[0]).resolve()
        stat = executable.stat()
        return repr(
            (self.command, str(executable), stat.st_size, stat.st_mtime_ns, FLAGS, self.flags)
            + ((cpu_identity(),) if self.target == "native" else ())
        )

    def build(self, source: Path, output: Path, extra: tuple[str, ...] = (), openmp: bool = True) -> None:
        """Compile `source` into the shared object `output`.  Raises BuildError."""
        command = [*self.command, *FLAGS, *self.flags, *(("-fopenmp",) if openmp else ()), *extra]
        command += [str(source), "-o", str(output), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{shlex.join(self.command)} could not be run: {error}") from None
        if done.returncode:
            if openmp and "omp" in done.stderr:  # a compiler without its OpenMP library still gives one thread
                return self.build(source, output, extra, openmp=False)
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:12])
            raise BuildError(f"{shlex.join(self.command)} failed with status {done.returncode}:\n{said}")


def find_compiler(command: str | None, target: str) -> Compiler:
    """The compiler for `command` (None: the first of cc, gcc, clang).  Raises BuildError when there is none, or when
    the target is unknown here."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    flags = TARGETS.get(machine, {"native": (), "portable": ()})
    if target not in flags:
        raise BuildError(f"unknown instruction set {target!r} on {machine}, expected one of {', '.join(flags)}")
    candidates = [tuple(shlex.split(command))] if command else [(x,) for x in ("cc", "gcc", "clang")]
    for candidate in candidates:
        if candidate and shutil.which(candidate[0]):
            return Compiler(candidate, target, flags[target])
    wanted = command or "cc, gcc or clang"
    raise BuildError(f"no C compiler ({wanted}) on the PATH: {INSTALL_HINT}")


@lru_cache(maxsize=1)
def cpu_identity() -> str:
    """A digest of the CPU's model and features, so that a cache shared between machines keeps their objects apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "features", "cpu part", "cpu implementer", "cpu architecture")
    lines = [line for line in text.splitlines() if line.split(":")[0].strip().lower() in wanted]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
