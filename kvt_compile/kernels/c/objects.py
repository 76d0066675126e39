"""C source -> one object in a folder: <name>.so, sealed, with its <name>.c beside it.

The name is a digest of source, compiler, flags and CPU.  An object ends with a digest of its name and its bytes, which
the loader of shared objects ignores: a truncated, damaged or renamed one is seen before it is mapped (mapping it could
kill the process) and built again.  Files appear by atomic rename: any number of processes may build the same kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
from _ctypes import dlclose
from dataclasses import dataclass
from pathlib import Path

from kvt_compile.kernels.c.toolchain import Compiler
from kvt_compile.kernels.disk.trust import read_own
from kvt_compile.kernels.disk.write import leftovers, size_of, sweep, work_folder, write_new

log = logging.getLogger(__name__)
_MARK = b"kvt-object-2"
_ENTRY = re.compile(r"^int (kvt_\w+)\([^)]*\) \{", re.MULTILINE)


def name_of(source: str, compiler: Compiler) -> str:
    """The name of a kernel's files, without their endings."""
    return hashlib.sha256(f"{compiler.identity}\0{source}".encode()).hexdigest()[:32]


def seal(name: str, body: bytes) -> bytes:
    """The bytes of a file that holds an object.  Against damage, not against people: ownership is for that."""
    return body + _MARK + _digest(name, body)


def unsealed(name: str, data: bytes) -> bytes | None:
    """The object in a file's bytes; None when they are not those that `seal` gave."""
    body, mark, digest = data[: -len(_MARK) - 32], data[-len(_MARK) - 32 : -32], data[-32:]
    return body if mark == _MARK and _digest(name, body) == digest else None


def _digest(name: str, body: bytes) -> bytes:
    return hashlib.sha256(f"{name}\0".encode() + body).digest()


def what_is_wrong(path: Path) -> str:
    """Why an object would not be loaded; empty for one that would.  Its folder is not looked at."""
    try:
        data = read_own(path)
    except OSError as error:
        return error.strerror or str(error)
    return "" if unsealed(path.stem, data) is not None else "its bytes are not those that were written"


def is_whole(path: Path) -> bool:
    """Whether an object is there, is the user's own, and its bytes are those that were written."""
    return not what_is_wrong(path)


def opened(path: Path, source: str) -> ctypes.CDLL | None:
    """The library in a file; None when there is none, or one that must not be loaded or cannot be."""
    if reason := what_is_wrong(path):
        if os.path.lexists(path):
            log.warning("%s is not loaded and built again: %s", path, reason)
        return None
    try:
        return _library(path, source)
    except OSError as error:
        log.warning("%s does not load and is built again: %s", path, error)
        return None


def built(path: Path, source: str, compiler: Compiler) -> ctypes.CDLL:
    """The library of a source, built now and kept at `path`.  Raises OSError (the folder cannot be written, or nothing
    in it be loaded) or BuildError."""
    log.info("building %s with %s", path.name, compiler.command[0])
    sweep(path.parent)
    # in the same folder, as a rename is atomic only there
    with work_folder(path.parent, f".{path.stem}-") as work:
        text, output, sealed = Path(work, f"{path.stem}.c"), Path(work, path.name), Path(work, "sealed")
        write_new(text, source.encode())
        compiler.build(text, output)
        write_new(sealed, seal(path.stem, output.read_bytes()))
        os.replace(text, path.with_suffix(".c"))
        os.replace(sealed, path)
    return _library(path, source)


def _library(path: Path, source: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    missing = [entry for entry in _ENTRY.findall(source) if not hasattr(library, entry)]
    if missing:
        dlclose(library._handle)  # else the next object of this name would be taken for it
        raise OSError(f"{path} has no function {missing[0]}")
    return library


@dataclass(frozen=True)
class Built:
    """A kernel in the cache: its object, and the source beside it; either may be missing."""

    path: Path

    @property
    def source(self) -> Path:
        return self.path.with_suffix(".c")

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return size_of(self.path) + size_of(self.source)

    def remove(self) -> None:
        """A process that has it loaded keeps it; others build it again.  Raises OSError."""
        for path in (self.path, self.source):
            remove(path)


def kept(cache: Path) -> list[Built]:
    """Every kernel kept in a cache folder, by name; damaged ones and halves too."""
    files = (cache / "c").glob("[!.]*")
    return [Built(cache / "c" / f"{stem}.so") for stem in sorted({x.stem for x in files if x.suffix in (".so", ".c")})]


def unfinished(cache: Path) -> list[Path]:
    """Folders that killed builds left behind."""
    return leftovers(cache / "c")


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; nothing where there is nothing.  Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
