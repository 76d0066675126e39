"""Texts that others wrote: JSON -> plain data within limits; any text -> what may be printed in a terminal.

Python's own reader takes more than a file of ours can hold: NaN, a field twice (the last one wins), half a surrogate
pair (which fails when it is written again), nesting until the stack ends.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from typing import Any

MOST_BYTES = 64 << 20
DEPTH = 32
LARGEST = 2**63
TEXT = 1 << 20
"""Characters of one text."""


class BadTextError(ValueError):
    """What is wrong with a text, and where in it."""


def read_json(path: str | os.PathLike[str], infinite: bool = False) -> Any:
    """The data of a JSON file; `infinite`: with Infinity and -Infinity, as Python writes them.

    Raises OSError, or BadTextError saying what is wrong with it and where."""
    with open(path, "rb") as file:
        if stat.S_ISDIR(os.fstat(file.fileno()).st_mode):
            raise IsADirectoryError(f"{os.fspath(path)} is a folder")
        data = file.read(MOST_BYTES + 1)
    return parse_json(data, infinite)


def parse_json(data: bytes, infinite: bool = False) -> Any:
    """The data of a JSON text in UTF-8.  Raises BadTextError."""
    if len(data) > MOST_BYTES:
        raise BadTextError(f"it has more than {MOST_BYTES >> 20} MB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadTextError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_infinite if infinite else _no_number)
    except RecursionError:
        raise BadTextError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadTextError(f"it is not JSON: {error}") from None
    except BadTextError:
        raise
    except ValueError:  # a number with thousands of digits
        raise BadTextError("it has a number that is too long") from None
    _check(found, "", 0, infinite)
    return found


def shown(text: str, keep: str = "\n\t") -> str:
    """A text whose control characters, and what else a terminal obeys or hides, are written as escapes: \\x1b."""
    return "".join(x if x.isprintable() or x in keep else _escape(x) for x in text)


def _escape(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) == "Zs":  # a space of another width
        return character
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadTextError(f"it has the field {name!r} twice in one object")
        found[name] = value
    return found


def _no_number(name: str) -> float:
    raise BadTextError(f"it has {name}, which is no JSON number")


def _infinite(name: str) -> float:
    return _no_number(name) if name == "NaN" else float(name)


def _check(value: Any, place: str, depth: int, infinite: bool) -> None:
    if depth > DEPTH:
        raise BadTextError(f"{place or 'it'} is nested more than {DEPTH} deep")
    match value:
        case str():
            _check_text(value, place)
        case bool() | None:
            pass
        case int() if not -LARGEST <= value < LARGEST:
            raise BadTextError(f"{place or 'it'} is a number that does not fit into 64 bits")
        case float() if abs(value) == float("inf") and not infinite:
            raise BadTextError(f"{place or 'it'} is a number that is too large")
        case list():
            for n, item in enumerate(value):
                _check(item, f"{place}[{n}]", depth + 1, infinite)
        case dict():
            for name, item in value.items():
                _check_text(name, f"a name in {place or 'it'}")
                part = shown(name, keep="")[:80]
                _check(item, f"{place}.{part}" if place else part, depth + 1, infinite)


def _check_text(text: str, place: str) -> None:
    if len(text) > TEXT:
        raise BadTextError(f"{place or 'it'} is a text of {len(text)} characters")
    for n, x in enumerate(text) if not text.isascii() else ():
        if "\ud800" <= x <= "\udfff":
            raise BadTextError(f"{place or 'it'} has half a surrogate pair ({_escape(x)}) at character {n}")
