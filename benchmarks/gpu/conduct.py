"""Steps and seconds -> every step run in a process group of its own, ended at its limit, and how each of them ended.

A step that fails or hangs costs its own time and nothing else.  Standard library only, so that a torch that cannot be
imported is a line in the log and not the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.folder import Folder
from benchmarks.gpu.steps import RESERVE, Step, limit

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 3.0
"""Between asking a step to end and ending it."""
LEAST_S = 2.0
"""With less than this a step is not begun."""
POLL_S = 0.2
REPORT_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    steps: Sequence[Step]
    seconds: float
    dry: bool = False
    again: bool = False
    everything: bool = False
    """Of a dry run: compile what a real one may need, for a cache to carry."""


def conduct(
    plan: Plan,
    folder: Folder,
    say: Callable[[str], None],
    report: Callable[[], None],
    command: Callable[[Step, float, Path], list[str]] | None = None,
) -> bool:
    """Runs the steps; True when all of them ended well, now or in an earlier run over this folder.

    Args:
        say: gets a line for a person at every step's end.
        report: called now and then, and at the end of every step, to write the report anew.
        command: step, seconds, file for what it says -> the command of its process.
    """
    end = time.monotonic() + plan.seconds - RESERVE
    code = fingerprint()
    command = command or (lambda step, seconds, said: step_command(step, seconds, said, folder, plan, code))
    before = folder.load("run.json")
    of = {"code": code, "dry": plan.dry, "gpus": gpus()}
    same = {key: before.get(key) for key in of} == of
    if before and not same:
        aside = f"before-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        folder.set_aside(aside)
        say(f"of other code, another GPU or a dry run: what was in {folder.path} is in {aside} now")
    ended: dict[str, Any] = dict(before.get("steps", {})) if same else {}
    state = {**of, "seconds": plan.seconds, "steps asked for": [step.name for step in plan.steps]}
    state["started"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())

    def note(step: Step, **facts: Any) -> None:
        ended[step.name] = {"part": step.part, "what": step.what, **facts}
        folder.save("run.json", {**state, "steps": ended})
        report()

    folder.save("run.json", {**state, "steps": ended})
    steps = list(plan.steps)
    for number, step in enumerate(steps):
        if ended.get(step.name, {}).get("status") == "done" and not plan.again:
            say(f"{step.part} {step.name}: done before")
            continue
        seconds = limit(end - time.monotonic(), steps[number:], plan.dry)
        if seconds < LEAST_S:
            note(step, status="left out", reason=f"{seconds:.0f} s were left of {plan.seconds:.0f}")
            say(f"{step.part} {step.name}: left out, the time is spent")
            continue
        note(step, status="running", limit=round(seconds, 1))
        facts = run_step(step, seconds, folder, command, report)
        note(step, **facts)
        about = "; ".join(facts[key] for key in ("reason", "said") if key in facts)
        say(
            f"{step.part} {step.name}: {facts['status']} in {facts['seconds']:.0f} of {seconds:.0f} s. {about}".rstrip(
                ". "
            )
        )
    return all(ended[step.name]["status"] == "done" for step in steps)


def run_step(
    step: Step,
    seconds: float,
    folder: Folder,
    command: Callable[[Step, float, Path], list[str]],
    report: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One step in a process group of its own: status, seconds, limit, reason, and what it said of itself."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, (folder.path / "log.txt").open("ab", buffering=0) as log:
        said = Path(temporary, "said.json")
        log.write(f"\n--- {step.part} {step.name}: {step.what}; {seconds:.0f} s\n".encode())
        start = time.monotonic()
        # a group, and not a session: whatever ends this process's session ends the step too
        process = subprocess.Popen(
            command(step, seconds, said), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, process_group=0,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            late = not _wait(process, start + seconds, report)
        finally:  # also when this process is told to end
            end_group(process)
        facts: dict[str, Any] = {
            "status": "done",
            "seconds": round(time.monotonic() - start, 1),
            "limit": round(seconds, 1),
        }
        if late:
            facts |= {
                "status": "killed",
                "reason": f"it ran longer than its {seconds:.0f} s; what it had by then is kept",
            }
        elif process.returncode:
            facts |= {"status": "failed", "reason": f"exit code {process.returncode}: {_last_line(folder)}"}
        with suppress(OSError, ValueError):
            facts["said"] = json.loads(said.read_text())["summary"]
    folder.clean()
    return facts


def _wait(process: subprocess.Popen[bytes], end: float, report: Callable[[], None]) -> bool:
    """Whether it ended by itself before `end`."""
    reported = time.monotonic()
    while process.poll() is None:
        if time.monotonic() >= end:
            return False
        time.sleep(min(POLL_S, max(end - time.monotonic(), 0.0)))
        if time.monotonic() - reported > REPORT_S:
            report()
            reported = time.monotonic()
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Everything a step started: asked first, then made to."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        end = time.monotonic() + patience
        while time.monotonic() < end and _lives(process):
            time.sleep(0.05)
    process.poll()


def _lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the group is left (a zombie that was waited for is not)."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def step_command(step: Step, seconds: float, said: Path, folder: Folder, plan: Plan, code: str) -> list[str]:
    """What runs a step of this package."""
    found = [sys.executable, "-m", "benchmarks.gpu.step", step.name, "--out", str(folder.path.resolve())]
    found += ["--seconds", f"{seconds:.1f}", "--said", str(said), "--code", code]
    return found + ["--dry"] * plan.dry + ["--everything"] * plan.everything


def gpus() -> list[str]:
    """The names of the GPUs here, as the driver's own tool tells them."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def fingerprint() -> str:
    """Of the code that is measured and of what measures it: results of other code are not continued."""
    digest = hashlib.sha256()
    for folder in ("kvt_compile", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".jinja", ".c", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _last_line(folder: Folder) -> str:
    lines = (folder.path / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
