"""Card, driver, versions, what `kvt doctor` says -> machine.json.  Each is written before the next is asked for."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu.step import Context

PACKAGES = ("kvt-compile", "torch", "triton", "numpy", "timm", "transformers", "pytest", "pytest-xdist", "hypothesis")


def run(context: Context) -> None:
    about: dict[str, Any] = {"date": str(date.today()), "python": platform.python_version(), "cores": os.cpu_count()}
    about["versions"] = {name: installed(name) for name in PACKAGES}
    about["commit"] = said_by("git", "rev-parse", "--short", "HEAD")
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    about["nvidia-smi"] = said_by("nvidia-smi", query, "--format=csv,noheader")
    about["tools"] = {name: shutil.which(name) for name in ("ncu", "nsys", "nvcc", "cuobjdump", "gcc")}
    context.save("machine.json", about=about)
    about |= card()
    context.save("machine.json", about=about)
    context.log(
        f"{about.get('gpu') or 'no GPU'}, torch {about['versions']['torch']}, triton {about['versions']['triton']}"
    )
    from kvt_compile.doctor import examine

    diagnosis = examine().to_dict()
    context.save("machine.json", doctor=diagnosis)
    for check in diagnosis["checks"]:
        context.log(f"{check['status']:6} {check['name']}: {check['text']} {check['remedy']}".rstrip())
    bad = [check["name"] for check in diagnosis["checks"] if check["status"] == "failed"]
    context.say(f"{about.get('gpu') or 'no GPU'}; doctor: {', '.join(bad) + ' failed' if bad else 'healthy'}")


def card() -> dict[str, Any]:
    """What torch says of the GPU it would use; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "cuda": torch.version.cuda}
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "driver": (said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0],
        "cuda": torch.version.cuda,
        "memory_gb": round(facts.total_memory / 1e9, 1),
        "multiprocessors": facts.multi_processor_count,
        "l2_mb": round(getattr(facts, "L2_cache_size", 0) / 1e6, 1),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(*modules: str) -> list[str]:
    """Of some modules those that cannot be imported here."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def said_by(*command: str) -> str | None:
    """The output of a command; None where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
