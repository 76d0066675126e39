"""What `calibrate(..., select=...)` returns: a selection per attention, why, and what was measured; a mapping that goes
into `select`.

{"blocks.0.attn": "window(13) | prefix", "blocks.1.attn": None, ...}    +  what was measured       <->  a JSON file
"""

from __future__ import annotations

from dataclasses import dataclass

from kvt_compile.calibration.facts import SelectionCalibration
from kvt_compile.calibration.policy import SavedPolicy
from kvt_compile.calibration.read_selection import fields_of


@dataclass(frozen=True)
class CalibratedSelection(SavedPolicy[str | None], SelectionCalibration):
    """A selection per attention (None: it stays dense), as a mapping from module path to text:
    `options={"select": policy}`, `rewrite(..., select=policy)`, `set_select(module, policy)`.  Prints as a table; saves
    to and loads from JSON."""

    _word = "select"
    _show = "kvt_compile.calibration.show_selection"
    _read = staticmethod(fields_of)
