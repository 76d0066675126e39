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
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.facts import Calibration, Checked
from kvt_compile.calibration.read import fields_of
from kvt_compile.kernels.disk.text import read_json
from kvt_compile.kernels.disk.whole import write_whole
from kvt_compile.topk import TopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

FORMAT = 1
Choice = TypeVar("Choice", covariant=True)


class SavedPolicy(Checked, Mapping[str, Choice]):
    """What every calibrated policy is besides what it measured: a mapping from module path, a JSON file and a table."""

    _word: ClassVar[str]
    """The field of a site that says what was chosen for it, and the entry of the file that repeats it."""
    _show: ClassVar[str]
    """The module with its `render` and `plot`."""

    @staticmethod
    def _read(data: Any, version: int) -> dict[str, Any]:
        """The data of its file -> its fields.  Raises ValueError."""
        raise NotImplementedError

    def __getitem__(self, pattern: str) -> Choice:
        for site in self.sites:
            if glob.escape(site.path) == pattern:
                chosen: Choice = getattr(site, self._word)
                return chosen
        raise KeyError(pattern)

    def __iter__(self) -> Iterator[str]:
        return (glob.escape(site.path) for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        return {"kvt_calibration": FORMAT, self._word: dict(self), **asdict(cast(Any, self))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON; an existing file is replaced whole or not at all.  Raises OSError."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises OSError, and CalibrationError, with the place and the reason, for a file that is something else or was
        edited into what could not be used; nothing of it is taken then."""
        try:
            return cls(**cls._read(read_json(path, infinite=True), FORMAT))
        except ValueError as error:
            raise CalibrationError(f"{os.fspath(path)} cannot be used: {error}") from None

    def plot(self) -> Figure:
        """A figure of what was measured for every attention, with what was chosen, and of the policies tried.

        Raises ImportError without matplotlib.
        """
        figure: Figure = import_module(self._show).plot(self)
        return figure

    def __rich__(self) -> RenderableType:
        table: RenderableType = import_module(self._show).render(self)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass(frozen=True)
class CalibratedPolicy(SavedPolicy[TopK], Calibration):
    """A k per attention, as a mapping from module path to k: `options={"topk": policy}`, `rewrite(..., topk=policy)`,
    `set_topk(module, policy)`.  Prints as a table; saves to and loads from JSON."""

    _word = "topk"
    _show = "kvt_compile.calibration.show"
    _read = staticmethod(fields_of)
