"""`make gpu`: runs the steps over a folder, prints the report, and ends with 0 when every step ended well.

    python -m benchmarks.gpu [--out FOLDER] [--parts a,b,d] [--seconds 540] [--from FOLDER] [--cache FILE] [--dry]
    [--again]

What it has at any moment is written, so it may be cut at any moment; a second call over the same folder, or with
--from one that was carried, goes on where it ended.  Without a GPU it is a dry run: every kernel is launched on a
driver that runs nothing, and every file is written.  Standard library only: torch is imported by the steps, each in a
process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import cache, fits, report
from benchmarks.gpu.conduct import ROOT, Plan, conduct
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.steps import SECONDS, STEPS, chosen

KEPT = ROOT / "build" / "gpu-kept"
"""Compiled kernels and tuning results: of use to the next call, no result of this one."""


def main() -> int:
    start = time.monotonic()
    arguments = parse()
    try:
        steps = chosen(arguments.parts)
    except ValueError as error:
        sys.exit(f"make gpu: {error}")
    folder = Folder(arguments.out)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that a step's processes are ended and the report written

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)

    why_dry = "as asked" if arguments.dry else fits.no_gpu()
    say(f"{f'dry run ({why_dry})' if why_dry else 'run'} into {folder.path}, {arguments.seconds:.0f} s")
    say(f"the log: tail -f {folder.path / 'log.txt'}")
    if arguments.earlier:
        try:
            say(f"of {arguments.earlier}: {', '.join(folder.take_over(arguments.earlier)) or 'nothing new'}")
        except FileNotFoundError as error:
            sys.exit(f"make gpu: {error}; FROM names the folder of an earlier run")
    prepare(arguments.cache, say)
    plan = Plan(steps, arguments.seconds - (time.monotonic() - start), bool(why_dry), arguments.again)
    try:
        good = conduct(plan, folder, say, lambda: report.write(folder))
    finally:
        report.write(folder)
    print(f"\n{report.text(folder)}", end="", flush=True)
    say(f"files in {folder.path}: {', '.join(sorted(x.name for x in folder.path.iterdir()))}")
    return not good


def prepare(archive: Path | None, say: object) -> None:
    """Where kernels and tuning results are kept, a carried cache, and the project registered with this Python."""
    assert callable(say)
    os.environ.setdefault("TRITON_CACHE_DIR", str(KEPT / "triton"))
    os.environ.setdefault("KVT_CACHE_DIR", str(KEPT / "kvt"))
    if archive is not None and archive.exists():
        try:
            kernels = cache.unpack(archive, Path(os.environ["TRITON_CACHE_DIR"]))
            say(f"{kernels} compiled kernels of {archive}")
        except Exception as error:
            say(f"{archive} is not used: {type(error).__name__}: {error}")
    try:
        importlib.metadata.version("kvt-compile")
    except (
        importlib.metadata.PackageNotFoundError
    ):  # torch finds the backend by the entry point of an installed package
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-e",
            ".",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        say(
            "registered the project"
            if not done.returncode
            else f"the project is not registered: {done.stderr.strip()[-300:]}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{step.part} {step.name:10} {step.what}" for step in STEPS),
    )  # fmt: skip
    out = os.environ.get("OUT") or ROOT / "build" / "gpu"
    parser.add_argument("--out", type=Path, default=out, help="folder for the files (default: $OUT, else build/gpu)")
    parser.add_argument("--parts", default="", help="letters or names of steps, as in a,b,d (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--from", dest="earlier", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--cache", type=Path, default=cache.ARCHIVE, help="compiled kernels, by benchmarks.gpu.cache")
    parser.add_argument("--dry", action="store_true", help="launch everything on a driver that runs nothing")
    parser.add_argument("--again", action="store_true", help="steps that are done too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
