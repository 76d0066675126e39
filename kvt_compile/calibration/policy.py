"""What `calibrate` returns: a k per attention, why, and what was measured; a mapping that goes into `topk`.

{"blocks.0.attn": 0.1, "blocks.1.attn": 0.35, ...}    +  the budget, the curves, the check       <->  a JSON file
"""

from __future__ import annotations

import difflib
import glob
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.facts import Calibration, Check, SiteCurve
from kvt_compile.report.files import write_whole
from kvt_compile.topk import TopK, validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

FORMAT = 1


@dataclass(frozen=True)
class CalibratedPolicy(Calibration, Mapping[str, TopK]):
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy as JSON; an existing file is replaced whole or not at all.  Raises OSError."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibratedPolicy:
        """Reads what `save` wrote.  Raises OSError, and CalibrationError for a file that is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CalibrationError(f"{os.fspath(path)} is not JSON: {error}") from error
        if not isinstance(data, dict) or "kvt_calibration" not in data:
            raise CalibrationError(f"{os.fspath(path)} is no calibrated policy: it has no entry 'kvt_calibration'")
        if data["kvt_calibration"] != FORMAT:
            raise CalibrationError(
                f"{os.fspath(path)} has format {data['kvt_calibration']!r}, this version reads {FORMAT}; "
                "calibrate again"
            )
        try:
            return _from_dict(data)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{os.fspath(path)} is a damaged policy: {type(error).__name__}: {error}") from error

    def plot(self) -> Figure:
        """A figure of the mass and error curves with the chosen k of every attention, and of the policies tried.

        Raises ImportError without matplotlib.
        """
        from kvt_compile.calibration.show import plot

        return plot(self)

    def __rich__(self) -> RenderableType:
        from kvt_compile.calibration.show import render

        return render(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _from_dict(data: Mapping[str, Any]) -> CalibratedPolicy:
    def tuples(value: Any) -> Any:
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    def build(cls: Any, entry: Mapping[str, Any]) -> Any:
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in entry]:
            near = difflib.get_close_matches(missing[0], list(entry), n=1)
            raise KeyError(f"{missing[0]}{f' (there is {near[0]})' if near else ''}")
        return cls(**{name: tuples(entry[name]) for name in names})

    sites = tuple(build(SiteCurve, site) for site in data["sites"])
    for site in sites:
        validate(site.topk)
        if not isinstance(site.path, str):
            raise TypeError(f"path is {site.path!r}")
    policy = build(CalibratedPolicy, {**data, "sites": [], "check": None})
    values = {field.name: getattr(policy, field.name) for field in fields(CalibratedPolicy)}
    return CalibratedPolicy(**{**values, "sites": sites, "check": build(Check, data["check"])})
