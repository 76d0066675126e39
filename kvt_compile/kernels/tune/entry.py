"""One result of a measurement <-> JSON: the key, the winner, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvt_compile.kernels.tune.key import Key, checked

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
        measured = [checked(x, {"candidate": dict, "milliseconds": float}, "measured") for x in values["measured"]]
        dropped = [checked(x, {"candidate": dict, "reason": str}, "dropped") for x in values["dropped"]]
        return cls(
            Key.from_dict(values["key"]),
            values["winner"],
            tuple(Measured(**x) for x in measured),
            tuple(Dropped(**x) for x in dropped),
            values["date"],
        )
