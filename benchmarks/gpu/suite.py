"""The tests that need a GPU, in up to eight processes -> correct.json, after every test.

pytest with `-p benchmarks.gpu.suite`: this module is the plugin too, and writes from the process that hands out the
tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.folder import Folder
from benchmarks.gpu.machine import missing
from benchmarks.gpu.step import Context

TESTS = "tests/triton/test_triton_gpu.py"
PROCESSES = 8
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "KVT_GPU_SUITE"
"""Name of the variable that tells the plugin the folder."""


def run(context: Context) -> None:
    if context.dry:
        return _left_out(context, "they need a GPU; `make test` launches their kernels through the stub driver")
    if missing("pytest"):
        return _left_out(context, "pytest is not installed")
    command, without = [sys.executable, "-m", "pytest", "-m", "gpu", TESTS, "-q", "-p", "benchmarks.gpu.suite"], []
    if missing("xdist"):
        without.append("pytest-xdist: one process")
    else:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    if absent := missing("hypothesis", "torchvision"):
        without.append(f"{', '.join(absent)}: without tests/conftest.py")
        command.append("--noconftest")
    if without:
        context.log(f"missing: {'; '.join(without)}")
    context.save("correct.json", tests={"counts": {}, "failed": [], "without": without, "finished": False})
    environment = os.environ | {ENVIRONMENT: str(context.folder.path), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment).returncode
    tests = context.load("correct.json")["tests"] | {"exit code": code}
    context.save("correct.json", tests=tests)
    context.say(told(tests))
    sys.exit(code)


def told(tests: dict[str, Any]) -> str:
    """One line."""
    if "left out" in tests:
        return f"left out: {tests['left out']}"
    text = ", ".join(f"{n} {outcome}" for outcome, n in tests["counts"].items()) or "none ran"
    return text if tests["finished"] else f"{text}, not all ran"


def _left_out(context: Context, reason: str) -> None:
    context.save("correct.json", tests={"left out": reason})
    context.say(f"left out: {reason}")


class Recorder:
    """Every test's outcome -> the file, at most once a second and at the end."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.failed: list[dict[str, str]] = []
        self.written = 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.outcome == "failed":
                said = str(getattr(report, "longreprtext", "")).strip().splitlines()
                self.failed.append({"test": report.nodeid, "said": " | ".join(said[-3:])[:500]})
        if time.monotonic() - self.written > 1.0:
            self.write(False)

    def pytest_sessionfinish(self) -> None:
        self.write(True)

    def write(self, finished: bool) -> None:
        before = self.folder.load("correct.json")
        facts = {"counts": dict(self.counts), "failed": self.failed, "finished": finished}
        self.folder.save("correct.json", before | {"tests": before.get("tests", {}) | facts})
        self.written = time.monotonic()


def pytest_configure(config: Any) -> None:
    """Called by pytest, in every process."""
    folder = os.environ.get(ENVIRONMENT)
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Folder(Path(folder))))
