"""Which functions of the same scores have the same k largest in a row, in floats.

    s        2*s        s - s.amax(-1)        s.softmax(-1)

In real numbers a strictly increasing function keeps the order; in floats it may make equal what was not: s * 1e-60 is
0 all along a row, and so is most of the softmax of 100*s.  Where what selects and what is weighed differ in this, the
k largest of the one are not those of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvt_compile.passes.canonical.coords import Space
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.own.order import Function, Order
from kvt_compile.passes.finding.own.positive import bounded, lasting

_SHIFTED = 2.0**10
"""As many times smaller the scores may be that are weighed, where a row's maximum was subtracted from those that
select: what this rounds away is less than rounding makes of the weights."""


def same_largest(space: Space, order: Order, scores: Order, after: Sequence[Function] = ()) -> bool:
    """Whether the k largest of one element's row are those of another's, which goes through the functions `after`
    before it is weighed by a softmax."""
    mine, theirs = ([(x, space.resolve_all(at)) for x, at in order_.places] for order_ in (order, scores))
    met = next(((n, theirs.index(place)) for n, place in enumerate(mine) if place in theirs), None)
    if met is None:
        return False
    n, m = met
    return alike(order.functions[:n], (*after, *scores.functions[:m]), (*order.functions[n:], *order.product))


def alike(selects: Sequence[Function], weighed: Sequence[Function], shared: Sequence[Function] = ()) -> bool:
    """Whether two functions of the same scores, each a chain from the last to the first, keep the same order of all
    that a softmax of `weighed` gives weight to.  `shared` is what made these scores."""
    if not selects and not weighed:
        return True
    if not all(bounded(_numbers([*chain, *shared])) for chain in (selects, weighed)):
        return False
    if _tensors(selects) != _tensors(weighed) and not all(lasting(f.factor, f.dtype) for f in (*selects, *weighed)):
        return False
    return _forgets_no_weight(selects, weighed) and _weighs_what_it_has(weighed)


def _forgets_no_weight(selects: Sequence[Function], weighed: Sequence[Function]) -> bool:
    """Whether keys that are equal behind a softmax or a shift, far below the largest, have no weight."""
    for n, function in enumerate(selects):
        if function.kind != "factor":
            inside = selects[n + 1 :]
            colder = _SHIFTED if function.kind == "shift" else 1.0
            if _tensors(inside) != _tensors(weighed) or _number(inside) > colder * _number(weighed):
                return False
    return True


def _weighs_what_it_has(weighed: Sequence[Function]) -> bool:
    """Whether keys that are equal behind a shift in the scores themselves, far below the largest, have no weight: those
    that are equal behind a softmax have."""
    for n, function in enumerate(weighed):
        outside = weighed[:n]
        if function.kind == "softmax":
            return False
        if function.kind == "shift" and (_tensors(outside) or _SHIFTED * _number(outside) < 1):
            return False
    return True


def _numbers(functions: Sequence[Function]) -> list[tuple[float, torch.dtype | None]]:
    return [(f.factor, f.dtype) for f in functions if not isinstance(f.factor, Value)]


def _number(functions: Sequence[Function]) -> float:
    return math.prod(f.factor for f in functions if not isinstance(f.factor, Value))


def _tensors(functions: Sequence[Function]) -> list[Value]:
    return [f.factor for f in functions if isinstance(f.factor, Value)]
