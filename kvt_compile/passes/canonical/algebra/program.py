"""The program of a form -> values in a frame: what the softmax is taken of.

    [exp(s), mask(m)]  ->  where(m, s, -inf)      [exp(s) ** 0.69]  ->  0.69 * s      [exp(s), log(g)]  ->  s + log(g)

A frame is the coordinates of the result's dimensions.  A value that lies otherwise is permuted and gets dimensions of
size 1; one that cannot be brought into the frame so ends the search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvt_compile.kernels.language import score
from kvt_compile.passes.canonical.algebra.forms import Entry
from kvt_compile.passes.canonical.coords import ZERO, Coords, Space
from kvt_compile.passes.canonical.made import log_of_weight, made
from kvt_compile.passes.canonical.meaning import Builder
from kvt_compile.passes.canonical.values import Dim, Value


def written(b: Builder, space: Space, program: Sequence[Entry], frame: Coords) -> Value | None:
    """The sum of a program's exponents, as a value over the frame; None where it cannot be laid out there."""
    total: Value | None = None
    for entry in sorted(program, key=lambda entry: entry.kind == "mask"):
        x = laid_out(b, space, entry.value, entry.at, frame)
        if x is None:
            return None
        if entry.kind == "mask":
            total = _masked(b, total, x, entry.on)
        else:
            total = _added(b, total, _scaled(b, _log(b, x) if entry.kind == "log" else x, entry.power))
        if total is None:
            return None
    return total


def shape_of(x: Value, y: Value) -> tuple[Dim, ...]:
    """The shape two values broadcast to."""
    short, long = sorted((x.shape, y.shape), key=len)
    padded = (1,) * (len(long) - len(short)) + short
    return tuple(n if m == 1 else m for n, m in zip(long, padded, strict=True))


def _pointwise(b: Builder, name: str, fn: object, shape: tuple[Dim, ...], dtype: torch.dtype | None,
               *inputs: object) -> Value:  # fmt: skip
    return made(Value("pointwise", name, b.node, shape, dtype, inputs, {"fn": fn}))


def _log(b: Builder, x: Value) -> Value:
    return _pointwise(b, "log", log_of_weight, x.shape, x.dtype, x)


def _scaled(b: Builder, x: Value, power: float) -> Value:
    return x if power == 1.0 else _pointwise(b, "mul", score.mul, x.shape, x.dtype, x, power)


def _added(b: Builder, total: Value | None, x: Value) -> Value:
    if total is None:
        return x
    dtype = total.dtype if total.dtype == x.dtype or x.dtype is None else _wider(total.dtype, x.dtype)
    return _pointwise(b, "add", score.add, shape_of(total, x), dtype, total, x)


def _wider(x: torch.dtype | None, y: torch.dtype) -> torch.dtype:
    return y if x is None else torch.promote_types(x, y)


def _masked(b: Builder, total: Value | None, mask: Value, on: bool) -> Value | None:
    if total is None or mask.dtype is not torch.bool:
        return None
    sides = (total, -math.inf) if on else (-math.inf, total)
    return _pointwise(b, "where", score.where, shape_of(total, mask), total.dtype, mask, *sides)


def laid_out(b: Builder, space: Space, x: Value, at: Coords, frame: Coords) -> Value | None:
    """The value with its dimensions where the frame has them, so that it broadcasts against it."""
    at, frame = space.resolve_all(at), space.resolve_all(frame)
    if at == frame[len(frame) - len(at) :] or _broadcasts(at, frame[len(frame) - len(at) :]):
        return x
    where = {digit: (n, d) for n, coord in enumerate(frame) for d, digit in enumerate(coord.digits)}
    if not all(coord.plain and all(digit in where for digit in coord.digits) for coord in (*at, *frame)):
        return None
    rest = [d for d, coord in enumerate(at) if coord == ZERO]
    order = sorted((d for d, coord in enumerate(at) if coord != ZERO), key=lambda d: where[at[d].digits[0]])
    digits = [digit for d in order for digit in at[d].digits]
    present = [coord for coord in frame if set(coord.digits) & set(digits)]
    if digits != [digit for coord in present for digit in coord.digits]:
        return None  # a part of a dimension of the frame, or its parts in another order
    dims = (*rest, *order)
    if list(dims) != list(range(len(dims))):
        x = made(b.layout("permute", x, tuple(x.shape[d] for d in dims), dims=dims))
    shape = tuple(space.size(coord) if coord in present else 1 for coord in frame)
    return x if shape == x.shape else made(b.layout("reshape", x, shape))


def _broadcasts(at: Coords, tail: Coords) -> bool:
    return len(at) == len(tail) and all(coord in (ZERO, full) for coord, full in zip(at, tail, strict=True))
