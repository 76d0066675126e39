"""Functions that run on every rank of a few processes, which stay for the next one: starting them is what costs.

    Ranks(2).run(check, "cpu")   ->   check("cpu") on rank 0 and on rank 1, each in a process group of gloo

All sets are forks of one process that has imported what takes seconds.

A check is a function at the top of a module; it raises on the rank where something is wrong, and then the test fails
with that rank's traceback.  Whatever hangs is killed after a minute or so, and a new set of processes serves the next
check.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 300.0
"""Seconds a check may take, on a busy machine too; collectives give up a little earlier."""


IMPORTED = (
    "kvt_compile",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)
"""By the process that ranks are forks of: six seconds of a CPU, once instead of by each of six ranks."""


class RankError(AssertionError):
    """A check that failed, with every rank's traceback."""


class Ranks:
    """`world` processes."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="kvt-ranks-")
        store = Path(self._folder.name, "store")  # a file instead of a port: no two runs can want the same
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED])
        self._ends: list[Connection] = []
        self._processes = []
        with _one_thread():
            for rank in range(world):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, str(store), rank, world), daemon=True)
                process.start()
                theirs.close()
                self._ends.append(mine)
                self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        """What the check returns on each rank.  Raises RankError."""
        for end in self._ends:
            end.send((check, args))
        deadline = time.monotonic() + PATIENCE
        results, wrong = [], []
        for rank, end in enumerate(self._ends):
            try:
                if not end.poll(max(0.0, deadline - time.monotonic())):
                    wrong.append(f"rank {rank} did not answer in {PATIENCE:.0f} s")
                    continue
                fine, result = end.recv()
            except EOFError:
                wrong.append(f"rank {rank} is gone")
                continue
            if fine:
                results.append(result)
            else:
                wrong.append(f"rank {rank}:\n{result}")
        if wrong:
            self.close()  # ranks that wait for one another are of no use to the next check
            raise RankError("\n".join(wrong))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for end in self._ends:
            end.close()
        self._folder.cleanup()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(end: Connection, store: str, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE - 20)
    )
    while True:
        try:
            check, args = end.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            torch.compiler.reset()
            end.send((True, check(*args)))
        except BaseException:
            end.send((False, traceback.format_exc()))
