"""Results <-> one file, to carry them to other machines with the same GPU, and to ship them with the package.

{"format": 1, "results": [one result as in its own file, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kvt_compile.kernels.disk.text import read_json
from kvt_compile.kernels.disk.whole import write_whole
from kvt_compile.kernels.tune.entry import FORMAT, Entry, as_text
from kvt_compile.kernels.tune.key import Key, checked


class BadFile(ValueError):  # noqa: N818 - it says what is bad
    """A file that does not hold results; its text names the file and the place."""


def write(path: Path, entries: Iterable[Entry]) -> int:
    """Writes the results, in an order that depends on nothing but them, and returns how many.  Raises OSError."""
    results = sorted((entry.to_dict() for entry in entries), key=lambda x: json.dumps(x["key"], sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text({"format": FORMAT, "results": results}, 1).decode())
    return len(results)


def parse(path: Path) -> list[Entry]:
    """Every result of a file.  Raises BadFile when the file, or one result in it, is not what it should be."""
    try:
        data = checked(read_json(path), {"format": int, "results": list}, "the file")
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BadFile(f"{path} does not hold tuning results: {error}") from None
    if data["format"] != FORMAT:
        raise BadFile(f"{path} has format {data['format']}, expected {FORMAT}")
    entries: dict[Key, Entry] = {}
    for number, result in enumerate(data["results"], 1):
        try:
            entry = Entry.from_dict(result)
            if entry.key in entries:
                raise ValueError(f"it is for the same kernel and shapes as another one: {entry.key}")
        except ValueError as error:
            raise BadFile(f"{path}, result {number} of {len(data['results'])}: {error}") from None
        entries[entry.key] = entry
    return list(entries.values())
