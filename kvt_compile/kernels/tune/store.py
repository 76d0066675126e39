"""Result <-> file: <cache>/tune/<gpu>/<part>-<sizes>-<digest>.json, one result a file, key and winner in readable form.

One file each, so that nothing is ever read, changed and written back: any number of processes may write, and a damaged
file costs one result.  A file appears by atomic rename, and is read only where nobody else can have written it.
Results that come with the package (`shipped/`, one file per GPU in the form of `transfer.py`) are looked up after the
user's own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from kvt_compile.kernels.disk.text import parse_json
from kvt_compile.kernels.disk.trust import UntrustedError, own_folder, read_own
from kvt_compile.kernels.disk.write import leftovers, private_folder, sweep, work_folder, write_new
from kvt_compile.kernels.tune.entry import Entry, as_text
from kvt_compile.kernels.tune.key import Key
from kvt_compile.kernels.tune.transfer import BadFile, parse
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
        entry = self.read(path)
        if entry is not None and entry.key != key:
            warn_once(f"{path} holds another result than its name says (for {entry.key}) and is ignored: remove it")
            entry = None
        return entry or self._shipped.get(key)

    def read(self, path: Path) -> Entry | None:
        """The result in a file of this store; None where there is none, or, with a warning, none that may be used."""
        try:
            return self.parse(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UntrustedError as error:
            warn_once(f"tuning results in {path.parent} are ignored: {error}", about=("tune", path.parent))
        except (OSError, ValueError) as error:
            warn_once(
                f"the tuning result {path} cannot be read and is ignored: {error}; it will be replaced when tuned again"
            )
        return None

    def parse(self, path: Path) -> Entry:
        """The result in a file of this store.  Raises OSError, or ValueError saying what is wrong with it."""
        own_folder(path.parent, self.folder)
        return Entry.from_dict(parse_json(read_own(path)))

    def save(self, entry: Entry) -> Path:
        """Raises OSError where the folder cannot be written."""
        self.save_all([entry])
        return self.path(entry.key)

    def save_all(self, entries: Iterable[Entry]) -> None:
        """Keeps results; where one of them cannot be written, none is.  Raises OSError."""
        with staged(private_folder(self.folder)) as stage:
            for entry in entries:
                stage(self.path(entry.key), as_text(entry.to_dict(), 2))

    def entries(self) -> Iterator[tuple[Path, Entry]]:
        """The user's own results, by file name."""
        for path in self.files():
            entry = self.read(path)
            if entry is not None:
                yield path, entry

    def files(self) -> list[Path]:
        """Every file of a result, damaged ones too."""
        return sorted(self.folder.glob("*/[!.]*.json"))

    def unfinished(self) -> list[Path]:
        """Folders that killed processes left behind."""
        return [x for folder in (self.folder, *self.folder.glob("[!.]*/")) for x in leftovers(folder)]

    @cached_property
    def _shipped(self) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        for path in sorted(self.shipped.glob("*.json")):
            try:
                found |= {entry.key: entry for entry in parse(path)}
            except BadFile as error:
                warn_once(f"{error}; the results in it are ignored")
        return found


@contextmanager
def staged(folder: Path) -> Iterator[Callable[[Path, bytes], None]]:
    """Gives a function that writes a file below `folder`; all of them appear at the end, or, after an error, none.

    Raises OSError.
    """
    waiting: list[tuple[Path, Path]] = []
    sweep(folder)
    with work_folder(folder, ".new-") as work:

        def write(path: Path, data: bytes) -> None:
            private_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "there is a folder of that name", str(path))
            new = work / str(len(waiting))
            write_new(new, data)
            waiting.append((new, path))

        yield write
        for new, path in waiting:
            os.replace(new, path)


def read_into(path: Path, store: Store, replace: bool = False) -> tuple[int, int]:
    """Adds a file's results to a store; nothing is added when one of them is bad or cannot be written.  A result that
    the store has stays, unless `replace`.

    Returns (added, left as they were).  Raises BadFile, OSError.
    """
    entries = parse(path)
    wanted = [entry for entry in entries if replace or not os.path.lexists(store.path(entry.key))]
    store.save_all(wanted)
    return len(wanted), len(entries) - len(wanted)
