"""Where the tokens of an attention stand -> the selections that are tried there.

64x64 + 1   ->   window(9) | prefix, ..., window(45) | prefix, halo(8, 4) | prefix, regions(0.0625, 8) | prefix, ...

A small grid: windows and regions that keep about 1/64 to 1/2 of the keys.  Where a mask hides what comes later, windows
look back only, and no region is offered: the best regions of a query may all be hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvt_compile.calibration.choose import Choice
from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.measure import Choices
from kvt_compile.observe import AttentionCall, SiteCall
from kvt_compile.passes.site import AttentionSite
from kvt_compile.select.function import has_given
from kvt_compile.select.geometry import Geometry, check_geometry
from kvt_compile.select.text import parse
from kvt_compile.select.values import LARGEST, Halo, Prefix, Regions, SelectionError, Selector, Sinks, Window, split

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
SINKS = 4
"""Keys that every query keeps besides those right before it (StreamingLLM, arXiv 2309.17453)."""


def placed(site: AttentionSite) -> Selector:
    """Every key, said so that the node knows where its tokens stand: the rule a model is captured with."""
    return Window(LARGEST) | Prefix()


def offered(select: str | Selector | Sequence[str | Selector]) -> Choices:
    """What each attention chooses from: "auto", or the selections a user names, as far as they mean something there.

    Raises CalibrationError or SelectionError for what is no selection."""
    make: Callable[[AttentionCall, Geometry], Sequence[Selector]]
    if select == "auto":
        make = automatic
    else:
        given = [select] if isinstance(select, str | Selector) else select
        if not isinstance(given, Sequence) or not given:
            raise CalibrationError(f'select is {select!r}, expected "auto" or selections to choose from')
        named = [parse(x) if isinstance(x, str) else x for x in given]
        if wrong := [x for x in named if not isinstance(x, Selector)]:
            raise CalibrationError(f"select holds {wrong[0]!r} ({type(wrong[0]).__name__}), which is no selection")
        if held := [x for x in named if has_given(x)]:
            raise CalibrationError(f"{held[0]} holds a function, which is no text, and a policy is made of texts")

        def make(call: AttentionCall, geometry: Geometry) -> Sequence[Selector]:
            return named

    def choices(call: SiteCall) -> Sequence[Choice]:
        if not isinstance(call, AttentionCall) or call.geometry is None:
            return (1.0,)
        _, _, queries, keys = call.shape
        found = [x for x in make(call, call.geometry) if _means_something(x, call.geometry, queries, keys)]
        return (*dict.fromkeys(map(str, found)), 1.0)

    return choices


def automatic(call: AttentionCall, geometry: Geometry) -> list[Selector]:
    """The small grid."""
    grid = geometry.grid
    sizes = dict.fromkeys(_window_size(share, grid) for share in SHARES)
    if looks_back(call.score):
        return [_beside(Window(size, causal=True) | Sinks(SINKS), geometry) for size in sizes if size < max(grid)]
    found: list[Selector] = [Window(size) for size in sizes if size < max(grid)]
    if side := _region_size(grid):
        found += [Halo(side, halo) for halo in (side // 2, side)]
        found += [Regions(share, side) for share in SHARES if share * math.prod(-(-size // side) for size in grid) >= 1]
    return [_beside(x, geometry) for x in found]


def looks_back(score: str) -> bool:
    """Whether a score hides keys behind the query."""
    return "le(j, i)" in score


def _beside(x: Selector, geometry: Geometry) -> Selector:
    return x | Prefix() if geometry.prefix else x


def _window_size(share: float, grid: Sequence[int]) -> int:
    """The odd size whose window keeps about that share."""
    side: float = (share * math.prod(grid)) ** (1 / len(grid))
    return max(3, round(side) // 2 * 2 + 1)


def _region_size(grid: Sequence[int]) -> int:
    """The largest size that leaves 4 regions an axis, and 16 of one axis; 0 where none does."""
    least, sizes = (16, (128, 64, 32, 16, 8)) if len(grid) == 1 else (4, (8, 4, 2))
    return next((size for size in sizes if min(grid) // size >= least), 0)


def _means_something(x: Selector, geometry: Geometry, queries: int, keys: int) -> bool:
    allowed, _ = split(x)
    try:
        if allowed is not None:
            check_geometry(allowed, geometry, queries, keys)
    except SelectionError:
        return False
    return True
