"""Result <-> file: <cache>/tune/<gpu>/<part>-<sizes>-<digest>.json, one result a file, key and winner in readable form.

One file each, so that nothing is ever read, changed and written back: any number of processes may write, and a damaged
file costs one result.  A file appears by atomic rename.  Results that come with the package (`shipped/`, one file per
GPU in the form of `transfer.py`) are looked up after the user's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from kvt_compile.kernels.tune.entry import Entry
from kvt_compile.kernels.tune.key import Key
from kvt_compile.kernels.tune.transfer import BadFile, parse, write_atomically
from kvt_compile.kernels.warn import warn_once

SHIPPED = Path(__file__).parent / "shipped"


class Store:
    """The results below a folder, and the shipped ones."""

    def __init__(self, folder: Path, shipped: Path = SHIPPED) -> None:
        self.folder, self.shipped = folder, shipped

    def path(self, key: Key) -> Path:
        return self.folder / key.folder / f"{key.name}.json"

    def lock(self, key: Key) -> Path:
        """One for all kernels of a GPU: two at once would spoil each other's times."""
        return self.folder / key.folder / ".lock"

    def load(self, key: Key) -> Entry | None:
        """The user's result, else the shipped one, else None.  A damaged file gets a warning that names it."""
        path = self.path(key)
        entry = read_entry(path)
        if entry is not None and entry.key != key:
            warn_once(f"{path} holds another result than its name says (for {entry.key}) and is ignored: remove it")
            entry = None
        return entry or self._shipped.get(key)

    def save(self, entry: Entry) -> Path:
        """Raises OSError where the folder cannot be written."""
        path = self.path(entry.key)
        write_atomically(path, json.dumps(entry.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return path

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """The user's own results, by file name."""
        for path in self.files():
            entry = read_entry(path)
            if entry is not None:
                yield path, entry

    def files(self) -> list[Path]:
        """Every file of a result, damaged ones too."""
        return sorted(self.folder.glob("*/*.json"))

    @cached_property
    def _shipped(self) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        for path in sorted(self.shipped.glob("*.json")):
            try:
                found |= {entry.key: entry for entry in parse(path)}
            except BadFile as error:
                warn_once(f"{error}; the results in it are ignored")
        return found


def read_entry(path: Path) -> Entry | None:
    """The result in a file; None where there is no file, or, with a warning that names it, no readable one."""
    try:
        return parse_entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warn_once(
            f"the tuning result {path} cannot be read and is ignored: {error}; it will be replaced when tuned again"
        )
        return None


def parse_entry(path: Path) -> Entry:
    """The result in a file.  Raises OSError, or ValueError saying what is wrong with it."""
    try:
        return Entry.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_into(path: Path, store: Store, replace: bool = False) -> tuple[int, int]:
    """Adds a file's results to a store; nothing is added when one of them is bad.  A result that the store has stays,
    unless `replace`.

    Returns (added, left as they were).  Raises BadFile, OSError.
    """
    entries = parse(path)
    wanted = [entry for entry in entries if replace or not store.path(entry.key).exists()]
    for entry in wanted:
        store.save(entry)
    return len(wanted), len(entries) - len(wanted)
