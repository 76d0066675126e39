"""What a model makes of weights that are NaN, which are those of rows without a valid key: zeros, or anything else.

p.nan_to_num(0),  where(isnan(p), 0, p)     are what a softmax here has in such a row: zeros
p.nan_to_num(1/n),  where(isnan(p), g, p)   are not: there is no NaN to be found any more
"""

from __future__ import annotations

from kvt_compile.passes.canonical.algebra.dead_rows import is_zero
from kvt_compile.passes.canonical.shifts import is_bare
from kvt_compile.passes.canonical.values import Value

_KEEP_NAN = ("pointwise", "layout", "border", "select_by")
_LOGIC = frozenset({"logical_not", "logical_and", "logical_or", "identity", "any", "all"})


def fills_dead_rows(anchor: Value, stop: Value) -> Value | None:
    """What puts something else than zeros where the weights of a softmax are NaN; None where nothing does, and for
    bare scores, which leave no row without a valid key."""
    if is_bare(anchor.inputs[0]):
        return None
    weights, seen = [anchor], {anchor}
    while weights:
        here = weights.pop()
        for user in here.users:
            if user in seen or user.index >= stop.index:
                continue
            seen.add(user)
            if _is_asked(user, here):
                if not all(_is_zero_where(x, seen) for x in _choices(user)):
                    return user
            elif user.kind == "opaque" and user.name == "nan_to_num":
                return user
            elif user.kind in _KEEP_NAN:
                weights.append(user)
    return None


def _is_asked(value: Value, weights: Value) -> bool:
    """Whether it says which weights are NaN."""
    if value.name in ("isnan", "isfinite"):
        return True
    return value.name in ("eq", "ne") and all(x is weights for x in value.inputs)


def _choices(asked: Value) -> list[Value]:
    """What is made of the answer, behind logic."""
    found, queue, seen = list[Value](), [asked], {asked}
    while queue:
        for user in queue.pop().users:
            if user not in seen:
                seen.add(user)
                logic = user.name in _LOGIC or user.kind == "layout"
                (queue if logic else found).append(user)
    return found


def _is_zero_where(value: Value, weights: set[Value]) -> bool:
    """Whether a value is the weights, or zero."""
    sides = value.inputs[1:] if value.name == "where" else ()
    return len(sides) == 2 and any(map(is_zero, sides)) and any(x in weights for x in sides if isinstance(x, Value))
