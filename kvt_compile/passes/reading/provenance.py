"""Which kind of axis is attended over: tokens, channels or the batch.

XCiT multiplies (channels x tokens) by (tokens x channels): node for node the same graph as attention.  What differs is
where the key axis comes from, so its digits are followed back to the operation that made them:

    last axis of a linear layer, axis 1 of a convolution  ->  channel       axis 0 of a convolution  ->  batch
    an input of the graph, or nothing that says otherwise  ->  token
    lost behind an operation that is not understood  ->  unknown: it may be any of them
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvt_compile.passes.canonical.coords import Atom, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.reading.axes import behind, kept_by_shape
from kvt_compile.passes.reading.passing import passed_inputs
from kvt_compile.passes.reading.read import aligned
from kvt_compile.passes.site import Axis

_CONVOLUTIONS = frozenset(
    {"convolution", *(f"{name}{rank}d" for name in ("conv", "conv_transpose") for rank in (1, 2, 3))}
)
_BATCH_FIRST = _CONVOLUTIONS | frozenset(
    {
        "batch_norm",
        "group_norm",
        "instance_norm",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "interpolate",
        "pixel_shuffle",
    }
)
_LIMIT = 400
"""Steps back before giving up: real projections are a few steps away, and "token" is the safe answer."""


@dataclass(frozen=True)
class Lost:
    """The axis cannot be followed behind this operation, which is not understood."""

    at: Value


def kind_of_attention(
    space: Space,
    query: tuple[Value, Coords],
    key: tuple[Value, Coords],
    value: tuple[Value, Coords],
    queries: Iterable[Atom],
    keys: Iterable[Atom],
) -> tuple[Axis, str]:
    """The kind of the axis that is attended over, and for an unknown one where it is lost.

    Keys and values share the axis: where it is lost behind the keys, the values may tell.  Channels on one side only
    are latents, or tokens that a layer mixed.
    """
    keys = tuple(keys)
    axis = kind_of_axis(space, *key, keys)
    if isinstance(axis, Lost):
        of_values = kind_of_axis(space, *value, keys)
        axis = axis if isinstance(of_values, Lost) else of_values
    if axis in ("channel", "batch"):
        asked = kind_of_axis(space, *query, queries)
        axis = axis if asked == axis else asked if isinstance(asked, Lost) else "token"
    return ("unknown", axis.at.name) if isinstance(axis, Lost) else (axis, "")


def kind_of_axis(space: Space, value: Value, coords: Coords, axis: Iterable[Atom]) -> Axis | Lost:
    """The kind of the axis `axis` of `value` (read at `coords`); token when nothing says otherwise, and it was not lost
    behind an operation that is not understood."""
    space = space.copy()  # the splits of what lies behind are not the site's business
    wanted = set(axis)
    for _ in range(_LIMIT):
        coords = space.resolve_all(coords)
        wanted = set(space.resolve(Coord(tuple(wanted))).digits)
        here = {d for d, c in enumerate(coords) if wanted & set(c.digits)}
        if not here or value.kind in ("source", "sdpa"):
            return "token"
        if value.kind == "contraction" and not value.attrs["mixing"]:
            return "token"
        if makes_channels(value, here):
            return "channel"
        if value.name in _BATCH_FIRST and len(value.shape) > 2 and 0 in here and set(coords[0].digits) <= wanted:
            return "batch"
        back = step_back(space, value, coords, wanted, here)
        if back is None:
            return Lost(value) if value.kind == "opaque" else "token"
        value, coords = back
    return "token"


def makes_channels(value: Value, dims: set[int]) -> bool:
    """Whether these axes of the value are the features a layer computed."""
    if value.name in _CONVOLUTIONS:
        return dims == {1}
    if value.name == "embedding":
        return dims == {len(value.shape) - 1}
    if value.kind != "contraction":
        return False
    weight, other = ("rhs", "lhs") if value.attrs["raw_side"] == 1 else ("lhs", "rhs")
    return all(
        value.attrs["out"][d] in value.attrs[weight] and value.attrs["out"][d] not in value.attrs[other] for d in dims
    )


def step_back(
    space: Space, value: Value, coords: Coords, wanted: set[Atom], here: set[int]
) -> tuple[Value, Coords] | None:
    if value.kind == "layout":
        source = value.inputs[0]
        if value.name == "reshape":
            coords = _whole(space, value, coords, wanted)
        pulled = PULL[value.name](space, value, coords)
        return None if pulled is None else (source, pulled)
    if value.kind == "pointwise":
        inputs = [(x, space.resolve_all(aligned(coords, x))) for x in value.operands]
        return max(inputs, key=lambda item: _claim(item[0], item[1], wanted), default=None)
    if value.kind == "softmax":
        return value.inputs[0], coords
    if value.kind in ("contraction", "reduce"):
        inputs = passed_inputs(space, value, coords) or []
        return inputs[1 - value.attrs["raw_side"] if value.kind == "contraction" else 0] if inputs else None
    known = behind(space, value, coords, wanted)
    if known is None and value.kind == "opaque" and (kept := kept_by_shape(value, here)) is not None:
        return kept, coords
    return known


def _whole(space: Space, value: Value, coords: Coords, wanted: set[Atom]) -> Coords:
    """Coordinates a reshape can regroup: a slice or a constant is widened to its whole dimension."""
    out: list[Coord] = []
    for size, coord in zip(value.shape, coords, strict=True):
        if not space.covers(coord, size):
            wide = space.fresh("whole", size)
            if wanted & set(coord.digits):
                wanted.update(wide.digits)
            coord = wide
        out.append(coord)
    return tuple(out)


def _claim(value: Value, coords: Coords, wanted: set[Atom]) -> tuple[int, int, bool]:
    """Which operand to follow: one that has more of the wanted digits, one that is not broadcast, as a mask or a scale
    is, and then an activation rather than a parameter."""
    digits = {a for c in coords for a in c.digits} & wanted
    return len(digits), sum(size != 1 for size in value.shape), value.kind != "source"
