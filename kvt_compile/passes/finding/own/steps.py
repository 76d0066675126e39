"""A value on the way from the top scores to what becomes of them, and which of its dimensions counts the top keys."""

from __future__ import annotations

from dataclasses import dataclass

from kvt_compile.passes.canonical.coords import Space
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.values import Dim, Value, same


@dataclass(frozen=True)
class Step:
    value: Value
    dim: int


def make_wide(step: Step, keys: Dim) -> None:
    """It gets the keys' size in the place of k."""
    shape = step.value.shape
    step.value.shape = (*shape[: step.dim], keys, *shape[step.dim + 1 :])
    step.value.holder = None


def followed(value: Value, dim: int) -> int | None:
    """The dimension of a rearranged value's input that its dimension is."""
    if value.name not in ("permute", "reshape"):
        return None
    space = Space()
    coords = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(value.shape))
    below = PULL[value.name](space, value, coords)
    if below is None or not coords[dim].digits:
        return None
    here = [d for d, c in enumerate(space.resolve_all(below)) if c == space.resolve(coords[dim])]
    return here[0] if len(here) == 1 and same(value.inputs[0].shape[here[0]], value.shape[dim]) else None
