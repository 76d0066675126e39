"""where(every score of the row is -inf, 0, softmax(s))  ->  softmax(s)

A softmax here gives zeros in a row without a valid key.  Models that want that, and core ATen's `_safe_softmax`, write
it out: which scores are -inf, whether any of a row is not, and zeros where none is.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from kvt_compile.passes.canonical.meaning import Builder, axis
from kvt_compile.passes.canonical.values import Value

Said = Literal["masked", "valid", "dead", "alive"]
"""Of an element: its score is -inf, or is not; of a row: all of its scores are, or some are not."""
_NOT: dict[Said, Said] = {"masked": "valid", "valid": "masked", "dead": "alive", "alive": "dead"}


def without_dead_rows(b: Builder, value: Value) -> Value | None:
    """The softmax of a `where` that has zeros in the rows in which there is no key; None for any other."""
    condition, *sides = value.inputs
    weights = [_plain(x) for x in sides]
    for n, x in enumerate(weights):
        if not (isinstance(x, Value) and x.kind == "softmax") or not is_zero(sides[1 - n]):
            continue
        scores, dim = x.inputs[0], x.attrs["dim"]
        if x.shape == value.shape and _said(condition, scores, dim) == ("alive", "dead")[n]:
            made = Value("softmax", "softmax", b.node, value.shape, value.dtype, (scores,), {"dim": dim})
            x.attrs["within"] = made
            return made
    return None


def _plain(x: Any) -> Any:
    while isinstance(x, Value) and x.kind == "pointwise" and x.name == "identity":
        x = x.inputs[0]
    return x


def is_zero(x: Any) -> bool:
    """Whether it is the number 0, or a tensor of zeros."""
    x = _plain(x)
    while isinstance(x, Value) and (x.kind == "layout" or x.name in ("constant", "fill")) and x.inputs:
        x = x.inputs[0]
    return isinstance(x, int | float) and not isinstance(x, bool) and x == 0


def _said(x: Any, scores: Value, dim: int) -> Said | None:
    """What a condition says of the scores, as far as it is understood."""
    x = _plain(x)
    if not isinstance(x, Value):
        return None
    if x.kind == "pointwise" and x.name == "logical_not":
        inner = _said(x.inputs[0], scores, dim)
        return None if inner is None else _NOT[inner]
    if x.kind == "pointwise" and x.name in ("eq", "ne", "gt", "le") and x.inputs[1] == -math.inf:
        of = _plain(x.inputs[0])
        masked = x.name in ("eq", "le")
        if of is _plain(scores):
            return "masked" if masked else "valid"
        largest = isinstance(of, Value) and of.kind == "reduce" and of.name == "amax"
        if largest and of.attrs == {"dims": (dim,), "keepdim": True} and _plain(of.inputs[0]) is _plain(scores):
            return "dead" if masked else "alive"
        return None
    if x.kind == "opaque" and x.name == "isneginf" and len(x.inputs) == 1 and _plain(x.inputs[0]) is _plain(scores):
        return "masked"
    if x.kind == "opaque" and x.name in ("any", "all") and len(x.inputs) == 1:
        inner = _said(x.inputs[0], scores, dim)
        if _along(x, dim) and (x.name, inner) in (("all", "masked"), ("any", "valid")):
            return "dead" if x.name == "all" else "alive"
    return None


def _along(value: Value, dim: int) -> bool:
    """Whether `any` or `all` runs over one dimension and keeps it."""
    call, rank = value.attrs.get("call"), len(value.shape)
    if call is None:
        return False
    given = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    given = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
    keeps = call.kwargs.get("keepdim", call.args[2] if len(call.args) > 2 else False)
    return keeps is True and len(value.inputs[0].shape) == rank and axis(given, rank) == dim
