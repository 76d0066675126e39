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
LAUNCHES = "tests/triton/test_triton_launch.py"
OF_GPU_TESTS = "test_what_the_gpu_tests_compare or test_ties or test_identities or test_sites_and_long_rows"
NEEDED = "they need a GPU; `make test` launches their kernels through the stub driver"
PROCESSES = 8
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "KVT_GPU_SUITE"
"""Name of the variable that tells the plugin the folder."""


def run(context: Context) -> None:
    if missing("pytest"):
        return _left_out(context, "pytest is not installed")
    if context.dry:
        return launch(context) if context.everything else _left_out(context, NEEDED)
    command, without = command_for("gpu", TESTS)
    context.save("correct.json", tests={"counts": {}, "failed": [], "without": without, "finished": False})
    environment = os.environ | {ENVIRONMENT: str(context.folder.path), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([*command, "-p", "benchmarks.gpu.suite"], cwd=ROOT, env=environment).returncode
    tests = context.load("correct.json")["tests"] | {"exit code": code}
    context.save("correct.json", tests=tests)
    context.say(told(tests))
    sys.exit(code)


def command_for(mark: str, tests: str) -> tuple[list[str], list[str]]:
    """With what is installed here; and what it does without."""
    command, without = [sys.executable, "-m", "pytest", "-m", mark, tests, "-q", "-p", "no:cacheprovider"], []
    if missing("xdist"):
        without.append("pytest-xdist: one process")
    else:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    if absent := missing("hypothesis", "torchvision"):
        without.append(f"{', '.join(absent)}: without tests/conftest.py")
        command.append("--noconftest")
    return command, without


def launch(context: Context) -> None:
    """The kernels of those tests through the stub driver, so that a cache to carry has them."""
    command, _ = command_for("slow", LAUNCHES)
    code = subprocess.run([*command, "-k", OF_GPU_TESTS], cwd=ROOT).returncode
    context.say(f"the kernels of these tests: pytest ended with {code}")
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
