"""C source -> shared object: finds the compiler, knows its flags, runs it."""

from __future__ import annotations

import hashlib
import platform
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from kvt_compile.kernels.c.running import run

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
        "amx": ("-march=sapphirerapids",),
        "avx512bf16": ("-march=cooperlake", "-mtune=native"),
        "avx512": ("-march=skylake-avx512", "-mtune=native"),
        "avx2": ("-march=haswell",),
        "portable": ("-march=x86-64",),
    },
    "aarch64": {"native": ("-mcpu=native",), "portable": ()},
}
"""Machine -> name of an instruction set -> flags.  The source is the same for all; those that several makers' CPUs have
are tuned for the one at hand, as `native` is."""
NEEDED = {
    "amx": ("amx_tile", "amx_bf16", "avx512_bf16"),
    "avx512bf16": ("avx512_bf16",),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "bmi2"),
}
"""What a CPU must say it has, in Linux's words, before code for an instruction set is run on it."""
INSTALL_HINT = "install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; conda: conda install c-compiler)"


LIMIT_S = 60.0
"""Seconds of one run of the compiler: a kernel takes one or two."""
PROBE = """#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int kvt_probe(int64_t n, double *x) {
  double sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += sqrt(x[i]);
  return sum > 0;
}
"""


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message holds the first lines of what it said."""


class GivenUpError(BuildError):
    """The compiler does not work at all, and is not run again in this process."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler and the flags of one instruction set."""

    command: tuple[str, ...]
    target: str
    flags: tuple[str, ...]
    openmp: bool = True
    """Whether kernels are to have several threads."""

    @property
    def identity(self) -> str:
        """Changes whenever the same source might give another object: compiler, flags, the CPU when it is native."""
        executable = Path(shutil.which(self.command[0]) or self.command[0]).resolve()
        stat = executable.stat()
        return repr(
            (self.command, str(executable), stat.st_size, stat.st_mtime_ns, FLAGS, self.flags, self.openmp)
            + ((cpu_identity(),) if self.target == "native" else ())
        )

    def build(self, source: Path, output: Path, extra: tuple[str, ...] = ()) -> None:
        """Compile `source` into the shared object `output`.

        Raises BuildError, as GivenUpError when the compiler took longer than LIMIT_S or was given up before.
        """
        if (reason := _given_up.get(self._worker)) is not None:
            raise GivenUpError(reason)
        command = [*self.command, *FLAGS, *self.flags, *(("-fopenmp",) if self.openmp else ()), *extra]
        name = shlex.join(self.command)
        try:
            status, said = run([*command, str(source), "-o", str(output), "-lm"], LIMIT_S)
        except TimeoutError:
            raise self._give_up(f"{name} took longer than {LIMIT_S:.0f} s, and is not run again") from None
        except (OSError, ValueError) as error:
            raise self._give_up(f"{name} could not be run: {error}") from None
        said = said.replace(f"{source.parent}/", "")  # another name each time
        if status:
            raise BuildError(f"{name} failed with status {status}:\n{said}".rstrip(":\n"))
        if not output.is_file():
            raise BuildError(f"{name} ended well, but wrote no object:\n{said}".rstrip(":\n"))

    def probed(self) -> Compiler:
        """This compiler, or, where it cannot build with OpenMP, the one of a single thread.

        A tiny program decides, once in a process, and not what the compiler says: its words may stand in any message.

        Raises BuildError, as GivenUpError when it can build nothing at all.
        """
        if self._worker not in _with_openmp:
            try:
                with tempfile.TemporaryDirectory(prefix="kvt_compile.probe-") as work:
                    _with_openmp[self._worker] = self._probe(Path(work))
            except OSError as error:
                raise BuildError(f"there is no folder to try {shlex.join(self.command)} in: {error}") from None
        return self if _with_openmp[self._worker] else replace(self, openmp=False)

    def _probe(self, work: Path) -> bool:
        work.chmod(0o700)
        source = work / "probe.c"
        source.write_text(PROBE, encoding="utf-8")
        try:
            replace(self, openmp=True).build(source, work / "probe.so")
            return True
        except GivenUpError:
            raise
        except BuildError:
            pass
        try:
            replace(self, openmp=False).build(source, work / "alone.so")
            return False
        except GivenUpError:
            raise
        except BuildError as error:
            raise self._give_up(f"the C compiler cannot build a program of ten lines: {error}") from None

    def _give_up(self, reason: str) -> GivenUpError:
        _given_up[self._worker] = reason
        return GivenUpError(reason)

    @property
    def _worker(self) -> tuple[object, ...]:
        """What is remembered of: the compiler with its flags, not what it is asked for this time."""
        return self.command, self.flags


_given_up: dict[tuple[object, ...], str] = {}
_with_openmp: dict[tuple[object, ...], bool] = {}


def given_up() -> list[str]:
    """Why compilers are not run again in this process."""
    return list(_given_up.values())


def forget() -> None:
    """Compilers are tried anew."""
    _given_up.clear()
    _with_openmp.clear()


def find_compiler(command: str | None, target: str) -> Compiler:
    """The compiler for `command` (None: the first of cc, gcc, clang).  Raises BuildError when there is none, or when
    the target is unknown here."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    flags = TARGETS.get(machine, {"native": (), "portable": ()})
    if target not in flags:
        raise BuildError(f"unknown instruction set {target!r} on {machine}, expected one of {', '.join(flags)}")
    if missing := [x for x in NEEDED.get(target, ()) if cpu_flags() and x not in cpu_flags()]:
        there = ", ".join(x for x in flags if not cpu_flags() or cpu_flags().issuperset(NEEDED.get(x, ())))
        raise BuildError(
            f"instruction set {target!r} needs {', '.join(missing)}, which this CPU has not; it has {there}"
        )
    try:
        candidates = [tuple(shlex.split(command))] if command else [(x,) for x in ("cc", "gcc", "clang")]
    except ValueError as error:
        raise BuildError(f"the C compiler's command (CC) {command!r} cannot be read: {error}") from None
    for candidate in candidates:
        if candidate and shutil.which(candidate[0]):
            return Compiler(candidate, target, flags[target])
    wanted = command or "cc, gcc or clang"
    raise BuildError(f"no C compiler ({wanted}) on the PATH: {INSTALL_HINT}")


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """What the CPU says it can do; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(x for name, _, value in lines if name.strip() == "flags" for x in value.split())


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
