"""C source -> loaded library, built at most once per machine: <cache>/c/<hash>.so, with its <hash>.c beside it.

The name is a digest of source, compiler, flags and CPU.  An object ends with a digest of its own bytes, which the
loader of shared objects ignores, so a truncated or damaged one is seen before it is mapped (mapping it could kill the
process) and built again.  Files appear by atomic rename: any number of processes may build the same kernel at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvt_compile.kernels.c.settings import Settings
from kvt_compile.kernels.c.toolchain import BuildError, Compiler, find_compiler
from kvt_compile.kernels.warn import warn_once

log = logging.getLogger(__name__)
_MARK = b"kvt-object-1"


def load(source: str, settings: Settings) -> ctypes.CDLL:
    """The library of a C source, from the cache or built now.  Raises BuildError when it can be built nowhere."""
    compiler = find_compiler(settings.compiler, settings.target)
    name = hashlib.sha256(f"{compiler.identity}\0{source}".encode()).hexdigest()[:32]
    folder = settings.cache / "c"
    path = folder / f"{name}.so"
    if not is_whole(path):
        try:
            build(source, path, compiler)
        except (OSError, BuildError) as error:
            folder = _temporary_folder()
            path = folder / f"{name}.so"
            if not is_whole(path):
                build_anywhere(source, path, compiler)
            warn_once(
                f"kvt_compile cannot keep built kernels in {settings.cache}: {error}\n"
                f"They are built in {folder} instead, again in every process. "
                "Set KVT_CACHE_DIR to a folder that can be written."
            )
    return ctypes.CDLL(str(path))


@dataclass(frozen=True)
class Built:
    """A kernel in the cache: its object, and the source beside it."""

    path: Path

    @property
    def source(self) -> Path:
        return self.path.with_suffix(".c")

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return sum(x.stat().st_size for x in (self.path, self.source) if x.exists())

    def remove(self) -> None:
        """A process that has it loaded keeps it; others build it again."""
        for path in (self.path, self.source):
            path.unlink(missing_ok=True)


def built(cache: Path) -> list[Built]:
    """Every kernel kept in a cache folder, by name."""
    return [Built(path) for path in sorted((cache / "c").glob("*.so"))]


def is_whole(path: Path) -> bool:
    """Whether an object is there and its bytes are those that were written."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    body, mark, digest = data[: -len(_MARK) - 32], data[-len(_MARK) - 32 : -32], data[-32:]
    return mark == _MARK and hashlib.sha256(body).digest() == digest


def build(source: str, path: Path, compiler: Compiler) -> None:
    """Compile `source` and put the object at `path`.  Raises OSError (cannot write) or BuildError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("building %s with %s", path.name, compiler.command[0])
    # in the same folder, as a rename is atomic only there
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as work:
        text, output = Path(work, f"{path.stem}.c"), Path(work, path.name)
        text.write_text(source, encoding="utf-8")
        compiler.build(text, output)
        body = output.read_bytes()
        with output.open("ab") as file:
            file.write(_MARK + hashlib.sha256(body).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(text, path.with_suffix(".c"))
        os.replace(output, path)


def build_anywhere(source: str, path: Path, compiler: Compiler) -> None:
    """As `build`, with what could not be written as a BuildError too."""
    try:
        build(source, path, compiler)
    except OSError as error:
        raise BuildError(f"no folder to build a kernel in can be written: {error}") from None


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    """A private folder that goes with this process (a shared one could hand us somebody else's code)."""
    try:
        holder = tempfile.TemporaryDirectory(prefix="kvt_compile-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BuildError(f"no folder to build a kernel in can be written: {error}") from None
    _keep.append(holder)
    return Path(holder.name)


_keep: list[tempfile.TemporaryDirectory[str]] = []
