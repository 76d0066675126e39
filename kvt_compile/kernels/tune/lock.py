"""A file -> at most one holder at a time, among processes and threads; whoever waits does so with a bound.

flock, because the kernel releases it when its holder dies: no lock of a killed process stays behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvt_compile.kernels.disk.write import private_folder

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
POLL_S = 0.05


@contextmanager
def locked(path: Path, wait_s: float, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """True while this caller holds the lock, False when another one kept it for longer than `wait_s` seconds.

    `waiting` is called once, when the caller starts to wait.  Where files cannot be locked (a read-only folder, some
    network file systems) everybody holds it: work is then done twice, but files still appear by atomic rename.
    """
    try:
        private_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        yield True
        return
    try:
        # closing the descriptor releases the lock
        yield _acquire(descriptor, wait_s, waiting)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, wait_s: float, waiting: Callable[[], None]) -> bool:
    end = time.monotonic() + wait_s
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                return True
        if time.monotonic() >= end:
            return False
        if not told:
            told = True
            waiting()
        time.sleep(min(POLL_S, max(end - time.monotonic(), 0.0)))
