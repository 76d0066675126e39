"""Bytes -> a file that is the user's alone (0600, in folders of 0700, whatever the umask), there whole or not at all.

What is unfinished lives in a hidden folder beside its destination.  The folder is locked as long as its process lives,
so that what a killed process left is told from what is being made: a leftover has no lock, and is swept by whoever
writes there next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

OLD_S = 3600.0
"""Where folders cannot be locked (some network file systems), one that nobody touched for so long is a leftover."""


def private_folder(path: Path) -> Path:
    """Makes a folder and those above it that are missing, each for the user alone.  Raises OSError."""
    if not path.is_dir():
        if path != path.parent:
            private_folder(path.parent)
        try:
            path.mkdir(0o700)
            path.chmod(0o700)  # a umask may have taken the owner's own rights
        except FileExistsError:
            if not path.is_dir():
                raise
    return path


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder in `parent`, locked while in use and removed afterwards.  Raises OSError."""
    work, release = locked_folder(parent, prefix)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        release()


def locked_folder(parent: Path, prefix: str) -> tuple[Path, Callable[[], None]]:
    """A new private folder, and what gives its lock back.  Raises OSError."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # until the lock is ours, a sweep may take it for a leftover
        with suppress(FileNotFoundError):
            work.chmod(0o700)  # a umask may have taken the owner's own rights
        descriptor = _lock(work, wait=True)
        if work.is_dir():
            return work, partial(_release, descriptor)
        _release(descriptor)


def leftovers(parent: Path, pattern: str = ".*") -> list[Path]:
    """Folders of `work_folder` in `parent` whose process is gone, by name."""
    return [path for path in sorted(parent.glob(pattern)) if _if_left(path, lambda _: None)]


def sweep(parent: Path, pattern: str = ".*") -> None:
    """Removes the leftovers in `parent`; what cannot be removed stays."""
    for path in parent.glob(pattern):
        _if_left(path, lambda left: shutil.rmtree(left, ignore_errors=True))


def write_own(path: Path, data: bytes) -> None:
    """A reader sees the old file, or none, or the whole new one.  Raises OSError."""
    private_folder(path.parent)
    sweep(path.parent)
    with work_folder(path.parent, f".{path.stem}-") as work:
        new = work / "new"
        write_new(new, data)
        os.replace(new, path)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet, down to the disk.  Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def size_of(path: Path) -> int:
    """Bytes of a file, of a link itself, or of all files in a folder; 0 for what is gone meanwhile."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(size_of(x) for x in path.iterdir())
        return path.lstat().st_size
    except OSError:
        return 0


def _if_left(path: Path, then: Callable[[Path], None]) -> bool:
    """Whether a folder is a leftover; if so, `then` is called with it while it is locked."""
    try:
        found = path.lstat()
        if path.is_symlink() or not path.is_dir() or found.st_uid != os.geteuid():
            return False
        descriptor = _lock(path, wait=False)
    except OSError:  # it is in use, or gone
        return False
    try:
        if descriptor is None and time.time() - found.st_mtime < OLD_S:
            return False
        then(path)
        return True
    finally:
        _release(descriptor)


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock of a folder, None where folders cannot be locked.  Raises BlockingIOError when
    another process has it and `wait` is False; OSError when there is no such folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if wait:
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
