"""An older checkout of the repository in a process of its own, timed call by call, in turns with this one.

A script that is run with --serve prints where kvt_compile came from, then answers each line of JSON, the arguments of a
call, by a line with its milliseconds.  This file serves one: exact top-k attention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Checkout:
    """The process of one checkout; script: what it runs, a file that serves."""

    def __init__(self, folder: Path, script: str, threads: int = 1) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, script, "--serve"]
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        imported = Path(self._line())
        if not imported.is_relative_to(folder):
            raise SystemExit(f"{folder} was to be imported, and {imported} was: expected a checkout of the repository")

    def time(self, *arguments: object) -> float:
        """Milliseconds of one call."""
        assert self.process.stdin is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def serve() -> None:
    """[heads, tokens, features, k] -> milliseconds of processor time of an exact top-k forward."""
    import torch

    import kvt_compile

    print(kvt_compile.__file__, flush=True)
    for line in sys.stdin:
        heads, tokens, features, topk = json.loads(line)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, features) for _ in range(3))
        started = time.process_time()
        kvt_compile.topk_attention(q, k, v, topk=topk)
        print(1000 * (time.process_time() - started), flush=True)


if __name__ == "__main__" and "--serve" in sys.argv:
    serve()
