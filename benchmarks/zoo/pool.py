"""Jobs -> results, each in a process of its own that shares this one's imports; what dies or hangs costs only itself.

A forked child writes one JSON object to a pipe and ends.  Linux only, as forking with torch loaded is; one thread each.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Child:
    number: int
    pid: int
    pipe: int
    deadline: float
    text: bytearray = field(default_factory=bytearray)


def each_in_a_process(
    work: Callable[[int, dict[str, Any]], None], numbers: Sequence[int], *, jobs: int, timeout: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs work(number, result) for every number, `jobs` at a time, and yields (number, result) as they end.

    `work` fills `result`, which must be ready for JSON.  When it raises, what it filled in is kept and "failure" says
    why; when it hangs or dies there is only "failure".
    """
    waiting, running = list(numbers), dict[int, _Child]()
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < jobs:
                child = _start(work, waiting.pop(0), timeout)
                running[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=1.0):
                child = running[key.fd]
                if part := os.read(child.pipe, 1 << 16):
                    child.text += part
                    continue
                selector.unregister(child.pipe)
                del running[child.pipe]
                yield child.number, _end(child, "")
            for child in [c for c in running.values() if time.monotonic() > c.deadline]:
                selector.unregister(child.pipe)
                del running[child.pipe]
                os.kill(child.pid, signal.SIGKILL)
                yield child.number, _end(child, f"took more than {timeout:.0f} s")


def _start(work: Callable[[int, dict[str, Any]], None], number: int, timeout: float) -> _Child:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Child(number, pid, reading, time.monotonic() + timeout)
    os.close(reading)
    result: dict[str, Any] = {}
    try:
        work(number, result)
    except BaseException as error:
        result["failure"] = f"{type(error).__name__}: {error}"[:500]
        result["traceback"] = traceback.format_exc()[-3000:]
    with os.fdopen(writing, "w") as pipe:
        json.dump(result, pipe)
    os._exit(0)  # no cleaning up: the parent's atexit handlers are not the child's to run


def _end(child: _Child, failure: str) -> dict[str, Any]:
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    if failure:
        return {"failure": failure}
    try:
        result: dict[str, Any] = json.loads(child.text)
    except ValueError:
        return {"failure": f"the process ended with status {os.waitstatus_to_exitcode(status)} and said nothing"}
    return result
