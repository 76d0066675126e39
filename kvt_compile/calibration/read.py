"""The data of a policy's JSON file -> the fields of a `CalibratedPolicy`, every one checked.

A file is edited by hand, or comes from somebody else: what loads has to work wherever a measured policy does.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Sequence
from typing import Any

from kvt_compile.calibration.facts import Check, SelectionCurve, SiteCurve
from kvt_compile.kernels.tune.key import brief
from kvt_compile.topk import TopK, validate

BUDGETS = ("mass", "cosine", "ratio")


def fields_of(data: Any, version: int) -> dict[str, Any]:
    """Raises ValueError with the place and the reason."""
    of_format(data, version)
    grid = many(data, "grid", _topk)
    sites = many(data, "sites", lambda site, place: _site(site, place, grid))
    same("topk", data.get("topk"), sites)
    return checked(data) | {"grid": grid, "sites": sites}


def _site(data: Any, place: str, grid: tuple[TopK, ...]) -> SiteCurve:
    def curve(name: str) -> tuple[float, ...]:
        values = many(data, name, number, place)
        if len(values) != len(grid):
            raise ValueError(f"{place}.{name} has {len(values)} entries, expected {len(grid)}, as many as grid")
        return values

    site = SiteCurve(
        path=field(data, "path", text, place),
        keys=field(data, "keys", count, place),
        topk=field(data, "topk", _topk, place),
        mass=curve("mass"),
        error=curve("error"),
        model_error=curve("model_error"),
        checked_mass=field(data, "checked_mass", number, place),
        checked_mass_bound=field(data, "checked_mass_bound", bound, place),
    )
    if site.topk not in grid:
        raise ValueError(f"{place}.topk is {site.topk!r}, which is not one of the measured: grid is {list(grid)}")
    return site


def of_format(data: Any, version: int) -> None:
    """Raises ValueError for what is no policy of this format, whatever it chose."""
    if not isinstance(data, dict) or "kvt_calibration" not in data:
        raise ValueError("it is no calibrated policy: it has no entry 'kvt_calibration'")
    if data["kvt_calibration"] != version:
        raise ValueError(
            f"it has format {brief(data['kvt_calibration'])}, this version reads {version}; calibrate again"
        )


def checked(data: Any) -> dict[str, Any]:
    """The fields that a policy of any kind has."""
    return {
        "budget": field(data, "budget", budget),
        "value": field(data, "value", number),
        "confidence": field(data, "confidence", number),
        "check": field(data, "check", check),
        "trail": many(data, "trail", point),
    }


def check(data: Any, place: str) -> Check:
    return Check(
        examples=field(data, "examples", count, place),
        cosine=field(data, "cosine", number, place),
        cosine_bound=field(data, "cosine_bound", bound, place),
        cosine_worst=field(data, "cosine_worst", number, place),
        error=field(data, "error", number, place),
    )


def same(word: str, said: Any, sites: Sequence[SiteCurve | SelectionCurve]) -> None:
    """`topk` or `select` repeats what the sites say, for a person who reads the file; an edit of one means nothing."""
    if said is None:
        return
    if not isinstance(said, dict):
        raise ValueError(f"{word} is {brief(said)}, expected an object")
    # of two with one path the first counts
    meant = {glob.escape(site.path): getattr(site, word) for site in reversed(sites)}
    for pattern in [*said, *meant]:
        if pattern not in said or pattern not in meant or said[pattern] != meant[pattern]:
            raise ValueError(
                f"{word} says {brief(said.get(pattern))} for {brief(pattern)}, and sites {brief(meant.get(pattern))}; "
                f"edit both, or give a plain mapping of patterns as the option {word}"
            )


Reader = Callable[[Any, str], Any]


def field(data: Any, name: str, read: Reader, place: str = "") -> Any:
    inner = f"{place}.{name}" if place else name
    if not isinstance(data, dict):
        raise ValueError(f"{place or 'it'} is {brief(data)}, expected an object")
    if name not in data:
        raise ValueError(f"{place or 'it'} has no entry {name!r}")
    return read(data[name], inner)


def many(data: Any, name: str, read: Reader, place: str = "") -> tuple[Any, ...]:
    def items(value: Any, inner: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{inner} is {brief(value)}, expected a list")
        return tuple(read(item, f"{inner}[{n}]") for n, item in enumerate(value))

    found: tuple[Any, ...] = field(data, name, items, place)
    return found


def number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place} is {brief(value)}, expected a number")
    return value


def bound(value: Any, place: str) -> float:
    """Nothing at all may be known of what a mean is at least."""
    return value if isinstance(value, float) and value == -math.inf else number(value, place)


def count(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{place} is {brief(value)}, expected a whole number from 1 on")
    return value


def text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {brief(value)}, expected a text")
    return value


def budget(value: Any, place: str) -> str:
    if value not in BUDGETS:
        raise ValueError(f"{place} is {brief(value)}, expected one of {', '.join(BUDGETS)}")
    return str(value)


def _topk(value: Any, place: str) -> TopK:
    try:
        return validate(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def point(value: Any, place: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{place} is {brief(value)}, expected three numbers")
    first, second, third = (number(x, f"{place}[{n}]") for n, x in enumerate(value))
    return first, second, third
