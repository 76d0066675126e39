"""Results <-> one file, to carry them to other machines with the same GPU, and to ship them with the package.

{"format": 1, "results": [one result as in its own file, ...]}
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kvt_compile.kernels.tune.entry import FORMAT, Entry
from kvt_compile.kernels.tune.key import checked


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


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file, or none, or the whole new one.  Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, as a rename is atomic only there
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent, ignore_cleanup_errors=True) as work:
        new = Path(work, path.name)
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
