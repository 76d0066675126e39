"""One result of a measurement <-> JSON: the key, the winner, and what was measured on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvt_compile.kernels.tune.key import Key, brief, checked

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """One candidate and its median."""

    candidate: Mapping[str, Any]
    milliseconds: float


@dataclass(frozen=True)
class Dropped:
    """One candidate that could not be timed, and why."""

    candidate: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Entry:
    """One result."""

    key: Key
    winner: Mapping[str, Any]
    measured: tuple[Measured, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """Raises ValueError naming the field that is missing or wrong."""
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}, expected {FORMAT}")
        fields = {"format": int, "key": dict, "winner": dict, "measured": list, "dropped": list, "date": str}
        values = checked(data, fields, "the result")
        _flat(values["winner"], "winner")
        measured = [checked(x, {"candidate": dict, "milliseconds": float}, "measured") for x in values["measured"]]
        dropped = [checked(x, {"candidate": dict, "reason": str}, "dropped") for x in values["dropped"]]
        for what, items in (("measured", measured), ("dropped", dropped)):
            for n, item in enumerate(items):
                _flat(item["candidate"], f"{what}[{n}].candidate")
        return cls(
            Key.from_dict(values["key"]),
            values["winner"],
            tuple(Measured(**x) for x in measured),
            tuple(Dropped(**x) for x in dropped),
            values["date"],
        )


def _flat(values: Mapping[str, Any], what: str) -> None:
    """Block sizes are a few names with numbers or words.  Raises ValueError."""
    for name, value in values.items():
        if not isinstance(value, int | float | str) or len(name) > 100 or len(str(value)) > 100:
            raise ValueError(f"{what}: {brief(name)} is {brief(value)}, expected a number or a word")


def as_text(data: Mapping[str, Any], indent: int) -> bytes:
    """JSON as it stands in our files."""
    return (json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
