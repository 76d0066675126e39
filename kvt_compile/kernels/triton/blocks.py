"""Block sizes of one kernel launch: what is chosen per GPU and shape, while the source depends on the spec alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = ("resident", "streaming")


@dataclass(frozen=True)
class Blocks:
    """rows x cols scores in a tile, computed by `warps` warps, loads `stages` deep in flight.

    kind "resident": the tile holds whole rows, cols >= Nk.  kind "streaming": tiles of a row follow one another.
    """

    kind: str
    rows: int
    cols: int
    warps: int
    stages: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Blocks:
        """The inverse of `to_dict`.  Raises ValueError that names the field that is missing, unknown or out of
        range."""
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in values:
                raise ValueError(f"block sizes without {name!r}, expected {', '.join(names)}")
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"block sizes with an unknown field {name!r}, expected {', '.join(names)}")
            if name == "kind":
                if value not in KINDS:
                    raise ValueError(f"block sizes with kind {value!r}, expected one of {', '.join(KINDS)}")
            elif type(value) is not int or value < 1:
                raise ValueError(f"block sizes with {name} = {value!r}, expected a positive integer")
            elif name != "stages" and value & (value - 1):
                raise ValueError(f"block sizes with {name} = {value!r}, expected a power of two")
        return cls(**values)
