"""Results <-> one file, to carry them to other machines with the same GPU, and to ship them with the package.

{"format": 1, "results": [one result as in its own file, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kvt_compile.kernels.tune.key import checked
from kvt_compile.kernels.tune.store import FORMAT, Entry, Store, write_atomically


class BadFile(ValueError):  # noqa: N818 - it says what is bad
    """A file that does not hold results; its text names the file and the place."""


def write(path: Path, entries: Iterable[Entry]) -> int:
    """Writes the results, in an order that depends on nothing but them, and returns how many.  Raises OSError."""
    results = sorted((entry.to_dict() for entry in entries), key=lambda x: json.dumps(x["key"], sort_keys=True))
    write_atomically(path, json.dumps({"format": FORMAT, "results": results}, indent=1, ensure_ascii=False) + "\n")
    return len(results)


def parse(path: Path) -> list[Entry]:
    """Every result of a file.  Raises BadFile when the file, or one result in it, is not what it should be."""
    try:
        data = checked(json.loads(path.read_text(encoding="utf-8")), {"format": int, "results": list}, "the file")
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} does not hold tuning results: {error}") from None
    if data["format"] != FORMAT:
        raise BadFile(f"{path} has format {data['format']}, expected {FORMAT}")
    entries = []
    for number, result in enumerate(data["results"], 1):
        try:
            entries.append(Entry.from_dict(result))
        except ValueError as error:
            raise BadFile(f"{path}, result {number} of {len(data['results'])}: {error}") from None
    return entries


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
