"""From which axis of which input of the model the keys of an attention come.

    linear -> reshape -> product, over axis 0 of x        ->  KeysFrom("x", (0,))
    flatten of a map behind a convolution of an image     ->  KeysFrom("image", (2, 3))

The axis is followed back as its kind is (provenance.py), and further: through attention it is that of the queries, and
where several tensors become one, those are tried that have it until one comes from an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvt_compile.passes.canonical.coords import Atom, Coord, Coords, Space
from kvt_compile.passes.canonical.inputs import input_name
from kvt_compile.passes.canonical.values import Value, same
from kvt_compile.passes.reading.axes import behind
from kvt_compile.passes.reading.passing import contraction_inputs
from kvt_compile.passes.reading.provenance import makes_channels, step_back
from kvt_compile.passes.reading.read import aligned
from kvt_compile.passes.site import KeysFrom

_LIMIT = 400
"""Steps back before giving up.  Residual streams are a few steps a layer."""

_Place = tuple[Value, Coords, set[Atom]]


def keys_from(space: Space, operands: Iterable[tuple[Value, Coords]], axis: Iterable[Atom]) -> KeysFrom | None:
    """The input that `axis` of the operands comes from, of the first of them that tells; None where it cannot be
    followed: layers computed it, it is a parameter's, or it is lost."""
    space, axis = space.copy(), set(axis)
    return next((found for value, at in operands if (found := _follow(space, value, at, axis))), None)


def _follow(space: Space, value: Value, coords: Coords, axis: set[Atom]) -> KeysFrom | None:
    places: list[_Place] = [(value, coords, axis)]
    seen: set[Value] = set()
    for _ in range(_LIMIT):
        if not places:
            return None
        value, coords, wanted = places.pop()
        coords, wanted = space.resolve_all(coords), _now(space, wanted)
        here = _dims(coords, wanted)
        if not here or value in seen:
            continue
        seen.add(value)
        name = input_name(value)
        if name:
            return KeysFrom(name, tuple(sorted(here)))
        product = value.kind == "contraction" and not value.attrs["mixing"]
        if value.kind != "source" and (product or not makes_channels(value, here)):
            places += reversed(list(_behind(space, value, coords, wanted, here)))
    return None


def _behind(space: Space, value: Value, coords: Coords, wanted: set[Atom], here: set[int]) -> Iterator[_Place]:
    """Where the axis may come from, the likeliest first."""
    if value.kind == "border":
        yield value.inputs[0], coords, wanted
    elif value.kind == "pointwise":
        inputs = [(x, aligned(coords, x), wanted) for x in value.operands]
        yield from sorted(inputs, key=lambda place: _likely(space, place))
    elif value.kind == "sdpa" or (value.kind == "contraction" and not value.attrs["mixing"]):
        inputs = [(x, at, wanted) for x, at in _of_product(space, value, coords)]
        yield from sorted(inputs, key=lambda place: _likely(space, place))
    elif value.kind == "select_by" or value.name in ("cat", "stack"):
        for x in value.operands:
            mine = set(wanted)
            if (found := behind(space, value, coords, mine, of=x)) is not None:
                yield *found, mine
    else:
        mine = set(wanted)
        if (back := step_back(space, value, coords, mine, here)) is not None:
            yield *back, mine


def _of_product(space: Space, value: Value, coords: Coords) -> list[tuple[Value, Coords]]:
    """The operands of a product of two tensors that the model computed, and of an attention its queries: every axis but
    the last, which is that of the values, is theirs."""
    if value.kind == "contraction":
        return list(contraction_inputs(space, value, coords))
    q = value.inputs[0]
    if len(q.shape) != len(value.shape):
        return []
    kept = [d < len(q.shape) - 1 and same(q.shape[d], value.shape[d]) for d in range(len(q.shape))]
    return [(q, tuple(c if keep else Coord() for c, keep in zip(coords, kept, strict=True)))]


def _likely(space: Space, place: _Place) -> tuple[int, bool, int]:
    """Sorts by how much of the axis is there; parameters go last; of two activations the earlier one is nearer to an
    input (the residual stream before what is added to it)."""
    value, coords, wanted = place
    digits = {atom for coord in space.resolve_all(coords) for atom in coord.digits}
    return -len(digits & wanted), value.kind == "source" and not input_name(value), value.index


def _now(space: Space, wanted: set[Atom]) -> set[Atom]:
    return set(space.resolve(Coord(tuple(wanted))).digits)


def _dims(coords: Coords, wanted: set[Atom]) -> set[int]:
    return {d for d, coord in enumerate(coords) if wanted & set(coord.digits)}
