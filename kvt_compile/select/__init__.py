"""Which keys a query keeps: `kvt_compile.select.window(13) & kvt_compile.select.topk(64)`, or the same as text.

values   the selectors and their algebra      geometry   where tokens stand       content   choice by q and k
text     text -> value                        maps       what each selector keeps
"""

from __future__ import annotations

from kvt_compile.select.geometry import Geometry
from kvt_compile.select.text import parse
from kvt_compile.select.values import (
    Given,
    Halo,
    Heads,
    Keys,
    Mass,
    Prefix,
    Regions,
    SelectionError,
    Selector,
    Shifted,
    Sinks,
    TopK,
    Window,
)

# as they are written in a selection
topk = TopK
mass = Mass
window = Window
halo = Halo
regions = Regions
shifted = Shifted
sinks = Sinks
prefix = Prefix
keys = Keys
heads = Heads
given = Given

__all__ = [
    "Geometry",
    "SelectionError",
    "Selector",
    "given",
    "halo",
    "heads",
    "keys",
    "mass",
    "parse",
    "prefix",
    "regions",
    "shifted",
    "sinks",
    "topk",
    "window",
]
