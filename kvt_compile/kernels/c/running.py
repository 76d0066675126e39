"""A command -> its status and the first lines of what it said, within a time, whatever it does.

It gets no input, a session of its own (so that what it starts ends with it) and a private umask; what it prints beyond
the first lines is thrown away, so that a compiler that never stops talking fills neither memory nor disk.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence

LINES = 12
KEPT = 16384
"""Bytes of output."""
POLL_S = 0.05


def run(command: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Raises OSError or ValueError where it cannot be started, TimeoutError after `limit_s` seconds."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        umask=0o077,
    )
    assert process.stdout is not None
    try:
        said = _listen(process, process.stdout.fileno(), time.monotonic() + limit_s)
    except BaseException:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.stdout.close()
        process.wait()
    text = said.decode("utf-8", errors="replace").strip()
    return process.returncode, "\n".join(text.splitlines()[:LINES])


def _listen(process: subprocess.Popen[bytes], pipe: int, end: float) -> bytes:
    """What the process says until it ends; a child that it left behind with the pipe open is not waited for."""
    said = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if selector.select(min(left, POLL_S)):
                piece = os.read(pipe, 65536)
                said += piece[: KEPT - len(said)]
                if not piece:
                    _await(process, end)  # the pipe is closed, but the process may go on
                    return bytes(said)
            elif process.poll() is not None:
                return bytes(said)


def _await(process: subprocess.Popen[bytes], end: float) -> None:
    try:
        process.wait(max(end - time.monotonic(), POLL_S))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
