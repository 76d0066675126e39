"""What `calibrate(..., select=...)` returns: a selection per attention, why, and what was measured; a mapping that goes
into `select`.

{"blocks.0.attn": "window(13) | prefix", "blocks.1.attn": None, ...}    +  what was measured       <->  a JSON file
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.facts import SelectionCalibration
from kvt_compile.calibration.policy import FORMAT, SavedPolicy
from kvt_compile.calibration.read_selection import fields_of
from kvt_compile.kernels.disk.text import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class CalibratedSelection(SelectionCalibration, SavedPolicy, Mapping[str, str | None]):
    """A selection per attention (None: it stays dense), as a mapping from module path to text:
    `options={"select": policy}`, `rewrite(..., select=policy)`, `set_select(module, policy)`.  Prints as a table; saves
    to and loads from JSON."""

    def __getitem__(self, pattern: str) -> str | None:
        for site in self.sites:
            if glob.escape(site.path) == pattern:
                return site.select
        raise KeyError(pattern)

    def __iter__(self) -> Iterator[str]:
        return (glob.escape(site.path) for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __hash__(self) -> int:
        return hash((self.budget, self.value, tuple(self.items())))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        return {"kvt_calibration": FORMAT, "select": dict(self), **asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibratedSelection:
        """Reads what `save` wrote.

        Raises OSError, and CalibrationError, with the place and the reason, for a file that is something else or was
        edited into what could not be used; nothing of it is taken then."""
        try:
            return cls(**fields_of(read_json(path, infinite=True), FORMAT))
        except ValueError as error:
            raise CalibrationError(f"{os.fspath(path)} cannot be used: {error}") from None

    def plot(self) -> Figure:
        """A figure of error against time of every selection tried, the chosen ones marked, and of the policies tried.

        Raises ImportError without matplotlib.
        """
        from kvt_compile.calibration.show_selection import plot

        return plot(self)

    def __rich__(self) -> RenderableType:
        from kvt_compile.calibration.show_selection import render

        return render(self)
