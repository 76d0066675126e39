"""The folder that a run leaves: few files, each whole at any moment.  Standard library only.

    log.txt       everything that was printed         run.json      arguments, versions of the plan, how every step
    ended machine.json  card, driver, versions, doctor       correct.json  cells against float64, tests that need a GPU
    tuned.json    block sizes, for `kvt cache import`  speed.json    milliseconds of every cell and contestant, of the
    model profile.json  the slowest cells taken apart        report.md    what a person reads first

Eight, flat, with plain names: as many as fit through a narrow door between two machines.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

FILES = (
    "log.txt", "run.json", "machine.json", "correct.json", "tuned.json", "speed.json", "profile.json", "report.md",
)  # fmt: skip


class Folder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, name: str) -> dict[str, Any]:
        """What a file holds; empty where there is none, or none that can be read."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save(self, name: str, data: dict[str, Any]) -> None:
        self.write(name, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def update(self, name: str, **more: Any) -> None:
        """Sets some fields of a file and leaves the others."""
        self.save(name, self.load(name) | more)

    def write(self, name: str, text: str) -> None:
        """By rename: whoever reads, or cuts this process short, finds the old text or the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        new = self.path / f"{name}.new"
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / name)

    def take_over(self, earlier: Path) -> list[str]:
        """Copies the files of an earlier run that are not here yet, but for its log and report; returns their names.

        Raises FileNotFoundError when there is no such folder.
        """
        if not earlier.is_dir():
            raise FileNotFoundError(f"{earlier} is no folder")
        self.path.mkdir(parents=True, exist_ok=True)
        taken = []
        for name in FILES:
            if name not in ("log.txt", "report.md") and (earlier / name).is_file() and not (self.path / name).exists():
                shutil.copyfile(earlier / name, self.path / name)
                taken.append(name)
        return taken

    def set_aside(self, name: str) -> None:
        """Moves what an earlier run left into a folder of its own; tuning results, which know their kernels, stay as
        well."""
        found = [file for file in FILES if (self.path / file).is_file()]
        aside = self.path / name
        if found:
            aside.mkdir(parents=True, exist_ok=True)
        for file in found:
            (self.path / file).replace(aside / file)
        if "tuned.json" in found:
            shutil.copyfile(aside / "tuned.json", self.path / "tuned.json")

    def clean(self) -> None:
        """Removes what a process that was killed while it wrote left behind."""
        for name in FILES:
            (self.path / f"{name}.new").unlink(missing_ok=True)
        for left in self.path.glob(".tuned-*"):  # of the library's own way to write
            shutil.rmtree(left, ignore_errors=True)
