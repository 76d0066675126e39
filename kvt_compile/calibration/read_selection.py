"""The data of a selection policy's JSON file -> the fields of a `CalibratedSelection`, every one checked.

The texts of its selections are read as any text of a selection is, within limits, and only the canonical one is taken.
"""

from __future__ import annotations

from typing import Any

from kvt_compile.calibration.facts import SelectionCurve, Speed
from kvt_compile.calibration.read import bound, checked, count, field, many, number, of_format, same, text
from kvt_compile.kernels.tune.key import brief
from kvt_compile.select.text import parse


def fields_of(data: Any, version: int) -> dict[str, Any]:
    """Raises ValueError with the place and the reason."""
    of_format(data, version)
    if "select" not in data and "topk" in data:
        raise ValueError("it is a policy of numbers of keys: CalibratedPolicy.load reads it")
    sites = many(data, "sites", _site)
    same("select", data.get("select"), sites)
    return checked(data) | {
        "sites": sites,
        "speed": None if data.get("speed") is None else field(data, "speed", _speed),
        "left": many(data, "left", _left),
    }


def _site(data: Any, place: str) -> SelectionCurve:
    choices = many(data, "choices", _select, place)
    if not choices or choices[-1] is not None or None in choices[:-1]:
        raise ValueError(f"{place}.choices is {brief(choices)}, expected null (every key) at its end, and only there")

    def curve(name: str) -> tuple[float, ...]:
        values = many(data, name, number, place)
        if len(values) != len(choices):
            raise ValueError(f"{place}.{name} has {len(values)} entries, expected {len(choices)}, as many as choices")
        return values

    site = SelectionCurve(
        path=field(data, "path", text, place),
        keys=field(data, "keys", count, place),
        grid=field(data, "grid", text, place),
        select=field(data, "select", _select, place),
        choices=choices,
        seconds=curve("seconds"),
        kept=curve("kept"),
        mass=curve("mass"),
        error=curve("error"),
        model_error=curve("model_error"),
        checked_mass=field(data, "checked_mass", number, place),
        checked_mass_bound=field(data, "checked_mass_bound", bound, place),
    )
    if site.select not in choices:
        raise ValueError(f"{place}.select is {brief(site.select)}, which is not one of the measured: {list(choices)}")
    return site


def _select(value: Any, place: str) -> str | None:
    if value is None:
        return None
    try:
        meant = str(parse(text(value, place)))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if meant != value:
        raise ValueError(f"{place} is {brief(value)}, expected it as it is written out: {meant!r}")
    return meant


def _speed(data: Any, place: str) -> Speed:
    return Speed(
        examples=field(data, "examples", count, place),
        threads=field(data, "threads", count, place),
        device=field(data, "device", text, place),
        dense=field(data, "dense", number, place),
        saved=field(data, "saved", number, place),
        selected=field(data, "selected", number, place),
    )


def _left(value: Any, place: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{place} is {brief(value)}, expected a module path and a reason")
    return text(value[0], f"{place}[0]"), text(value[1], f"{place}[1]")
