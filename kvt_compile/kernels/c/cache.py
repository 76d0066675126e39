"""C source -> loaded library, built at most once per machine and kept in <cache>/c (`objects.py`).

Only what nobody else can have written is loaded (`disk/trust.py`).  Where the cache does not do, because it cannot be
written, belongs to somebody else or is on a file system that runs no code, a folder that goes with this process does.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from kvt_compile.kernels.c.objects import built, is_whole, name_of, opened
from kvt_compile.kernels.c.settings import Settings
from kvt_compile.kernels.c.toolchain import INSTALL_HINT, BuildError, Compiler, GivenUpError, find_compiler
from kvt_compile.kernels.disk.trust import own_folder
from kvt_compile.kernels.disk.write import locked_folder, private_folder, sweep, write_own
from kvt_compile.kernels.warn import warn_once

log = logging.getLogger(__name__)
TEMPORARY = "kvt_compile.build-"


def load(source: str, settings: Settings) -> ctypes.CDLL:
    """The library of a C source, from the cache or built now.  Raises BuildError when it can be built nowhere."""
    compiler = find_compiler(settings.compiler, settings.target)
    try:
        return _load(source, compiler, settings.cache / "c", settings.cache)
    except GivenUpError:
        raise
    except (OSError, BuildError) as error:
        trouble = error
    try:
        folder = _temporary_folder()
        library = _load(source, compiler, folder, folder)
    except OSError as error:
        raise BuildError(f"no folder to build a kernel in can be used: {trouble}; {error}") from None
    if isinstance(trouble, BuildError) and _carried(source, compiler, folder, settings.cache / "c"):
        log.warning("the C compiler failed once and worked when it was run again: %s", trouble)
        return library
    warn_once(
        f"kvt_compile cannot keep built kernels in {settings.cache}: {trouble}\n"
        f"They are built in {folder} instead, again in every process. Set KVT_CACHE_DIR to a folder of your own that "
        "can be written and is not mounted noexec.",
        about=("cache", settings.cache),
    )
    return library


def _load(source: str, compiler: Compiler, folder: Path, base: Path) -> ctypes.CDLL:
    """From a folder, or built in it.  Raises OSError when the folder does not do, else BuildError."""
    folder = own_folder(private_folder(folder), base)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(f"{folder} is on a file system that runs no code (it is mounted noexec)")

    def path(compiler: Compiler) -> Path:
        return folder / f"{name_of(source, compiler)}.so"

    if library := opened(path(compiler), source):
        return library
    try:
        if path(replace(compiler, openmp=False)).exists():  # a kernel of one thread: is that still all there can be?
            compiler = _probed(compiler)
        return opened(path(compiler), source) or built(path(compiler), source, compiler)
    except GivenUpError:
        raise
    except BuildError:
        probed = _probed(compiler)
        if probed == compiler:
            raise
        return opened(path(probed), source) or built(path(probed), source, probed)


def _probed(compiler: Compiler) -> Compiler:
    """What the compiler can do; says so when that is less than it should be."""
    found = compiler.probed()
    if not found.openmp:
        warn_once(
            f"the C compiler {' '.join(compiler.command)} cannot build with OpenMP, so kernels run on one thread; "
            f"install its OpenMP library (Debian, Ubuntu: apt install libomp-dev), or another compiler: {INSTALL_HINT}",
            about=("openmp", compiler.command),
        )
    return found


def _carried(source: str, compiler: Compiler, folder: Path, home: Path) -> bool:
    """Copies what was built elsewhere to where it belongs."""
    name = f"{name_of(source, compiler)}.so"
    if not is_whole(folder / name):
        return False
    try:
        for file in (Path(name).with_suffix(".c"), Path(name)):
            write_own(home / file, (folder / file).read_bytes())
    except OSError:
        return False
    return True


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    """A private folder that goes with this process.  Raises OSError where none can be made."""
    parent = Path(tempfile.gettempdir())
    sweep(parent, f"{TEMPORARY}*")
    folder, _ = locked_folder(parent, TEMPORARY)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not in a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
