"""What `calibrate` returns: a k per attention, why, and what was measured; a mapping that goes into `topk`.

{"blocks.0.attn": 0.1, "blocks.1.attn": 0.35, ...}    +  the budget, the curves, the check       <->  a JSON file
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.facts import Calibration
from kvt_compile.calibration.read import fields_of
from kvt_compile.kernels.disk.text import read_json
from kvt_compile.kernels.disk.whole import write_whole
from kvt_compile.topk import TopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

FORMAT = 1


class SavedPolicy:
    """What every calibrated policy is besides a mapping: a JSON file and a table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON; an existing file is replaced whole or not at all.  Raises OSError."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass(frozen=True)
class CalibratedPolicy(Calibration, SavedPolicy, Mapping[str, TopK]):
    """A k per attention, as a mapping from module path to k: `options={"topk": policy}`, `rewrite(..., topk=policy)`,
    `set_topk(module, policy)`.  Prints as a table; saves to and loads from JSON."""

    def __getitem__(self, pattern: str) -> TopK:
        for site in self.sites:
            if glob.escape(site.path) == pattern:
                return site.topk
        raise KeyError(pattern)

    def __iter__(self) -> Iterator[str]:
        return (glob.escape(site.path) for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __hash__(self) -> int:
        return hash((self.budget, self.value, tuple(self.items())))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        return {"kvt_calibration": FORMAT, "topk": dict(self), **asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibratedPolicy:
        """Reads what `save` wrote.

        Raises OSError, and CalibrationError, with the place and the reason, for a file that is something else or was
        edited into what could not be used; nothing of it is taken then."""
        try:
            return cls(**fields_of(read_json(path, infinite=True), FORMAT))
        except ValueError as error:
            raise CalibrationError(f"{os.fspath(path)} cannot be used: {error}") from None

    def plot(self) -> Figure:
        """A figure of the mass and error curves with the chosen k of every attention, and of the policies tried.

        Raises ImportError without matplotlib.
        """
        from kvt_compile.calibration.show import plot

        return plot(self)

    def __rich__(self) -> RenderableType:
        from kvt_compile.calibration.show import render

        return render(self)
