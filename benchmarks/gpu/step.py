"""One step in this process: `python -m benchmarks.gpu.step NAME --out FOLDER --seconds S [--dry]`.

A step's module has `run(context)`; it writes each result as soon as it has it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.gpu.conduct import fingerprint
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.steps import STEPS


class Context:
    """What a step is told, and where its results go."""

    def __init__(
        self,
        folder: Folder,
        seconds: float,
        dry: bool = False,
        everything: bool = False,
        said: Path | None = None,
        code: str = "",
    ) -> None:
        self.folder, self.seconds, self.dry, self.everything = folder, seconds, dry, everything
        self._said = said
        self._start = time.monotonic()
        self.of = {"code": code or fingerprint(), "dry": dry, "gpu": _gpu()}

    def left(self) -> float:
        """Seconds until this process is ended."""
        return self.seconds - (time.monotonic() - self._start)

    def load(self, name: str) -> dict[str, Any]:
        """A file as an earlier run of the same code on the same kind of GPU, dry or not as this one, left it; else
        empty."""
        found = self.folder.load(name)
        return found if {key: found.get(key) for key in self.of} == self.of else {}

    def save(self, name: str, **fields: Any) -> None:
        """Sets some fields of a file of this run."""
        self.folder.save(name, {**self.load(name), **self.of, **fields})

    def say(self, summary: str) -> None:
        """One line for the list of steps; the last one counts."""
        if self._said is not None:
            self._said.write_text(json.dumps({"summary": summary}))

    def survive(self) -> None:
        """Begins this step again in a fresh process when a kernel has broken CUDA for this one; results on disk
        stay."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.log(f"CUDA is broken here ({str(error).splitlines()[0]}): going on in a fresh process")
            sys.stdout.flush()
            rest = [x for x in sys.argv[1:] if x != "--seconds"]
            rest.remove(sys.argv[sys.argv.index("--seconds") + 1])
            os.execv(
                sys.executable,
                [sys.executable, "-m", "benchmarks.gpu.step", *rest, "--seconds", f"{max(self.left(), 1.0):.1f}"],
            )

    def log(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[step.name for step in STEPS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--said", type=Path)
    parser.add_argument("--code", default="", help="fingerprint that the results are of (default: of the code here)")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--everything", action="store_true")
    arguments = parser.parse_args()
    _end_with(os.getppid(), arguments.seconds + 10)
    warnings.filterwarnings("ignore", category=UserWarning)
    context = Context(
        Folder(arguments.out), arguments.seconds, arguments.dry, arguments.everything, arguments.said, arguments.code
    )
    importlib.import_module(f"benchmarks.gpu.{arguments.name}").run(context)


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _end_with(parent: int, seconds: float) -> None:
    """This process group ends when the parent does, or long after its limit: nobody may be there to end it."""

    def watch() -> None:
        end = time.monotonic() + seconds
        while os.getppid() == parent and time.monotonic() < end:
            time.sleep(1.0)
        if os.getpgrp() == os.getpid():  # started by conduct.py, and not by a shell with others in its group
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
