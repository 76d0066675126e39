"""Job + candidates -> times, measured in another process; compiled before in as many as there are processors.

A candidate that ends the process, or does not come back, is dropped, and another process goes on with the rest.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.jobs import Job, Task
from kvt_compile.kernels.tune.race import CannotMeasureError, Effort, Outcome, Tell

MOST_PROCESSES = 16
ANSWER_S = 120.0
"""How long the measuring process may take from one answer to the next: a compilation, or all of the race."""


def measure(
    job: Job, candidates: Sequence[Blocks], effort: Effort, tell: Tell[Blocks], within: str = ""
) -> Outcome[Blocks]:
    """Times of the candidates that can be run, and why the others cannot.  within: see `Task`.

    Raises CannotMeasureError where no process could be started, or none came as far as to try a candidate.
    """
    compile_in_pool(job, candidates, effort)
    left, outcome = list(candidates), Outcome[Blocks]()
    while left:
        task = Task("measure", job, tuple(left), effort, within)
        trying = None
        with _Process(task) as process:
            for kind, *rest in process.answers():
                if kind == "trying":
                    trying = left[rest[0]]
                    tell(trying)
                elif kind == "dropped":
                    outcome.dropped.append((left[rest[0]], rest[1]))
                    trying = None
                else:
                    outcome.times += [(left[n], ms) for n, ms in rest[0]]
                    return outcome
        if trying is None:
            raise CannotMeasureError(f"the process that measures ended: {process.why}")
        outcome.dropped.append((trying, f"ended the process that ran it: {process.why}"))
        gone = {x for x, _ in outcome.dropped}
        left = [x for x in left if x not in gone]
    return outcome


def compile_in_pool(job: Job, candidates: Sequence[Blocks], effort: Effort) -> None:
    """Compile into Triton's cache, some candidates in each of several processes."""
    count = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(candidates))
    if count < 2:
        return  # they are compiled where they are measured
    processes = [_Process(Task("compile", job, tuple(candidates[n::count]), effort)) for n in range(count)]
    for process in processes:
        with process:
            process.wait()


class _Process:
    """A worker with its task."""

    def __init__(self, task: Task) -> None:
        folder = str(Path(__file__).parents[3])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([folder, *filter(None, sys.path)]))}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvt_compile.kernels.triton.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise CannotMeasureError(f"no process can be started: {error}") from error
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # it may have ended before it reads
            pipe.write(pickle.dumps(task))
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.why = ""
        """It ended, once it has."""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def answers(self) -> Iterator[Any]:
        """Until it ends, or is silent for too long."""
        while True:
            try:
                line = self._lines.get(timeout=ANSWER_S)
            except queue.Empty:
                self.why = f"no answer for {ANSWER_S:.0f} s"
                return
            if not line:
                break
            yield json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.why = said[-1][:300] if said else f"signal {-code}" if code < 0 else f"status {code}"

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def wait(self) -> None:
        """Until it is done."""
        self._process.wait()
