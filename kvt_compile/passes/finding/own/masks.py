"""What may leave a row of scores with few keys, or none."""

from __future__ import annotations

from kvt_compile.passes.canonical.values import Value

NEVER = -1e4
"""A score so far below those of a row without masks weighs 0 in its softmax, whatever it is exactly."""


def mask_in(scores: Value) -> Value | None:
    """Something between the product and the scores that may mask keys, so that a row may have few of them."""
    queue, seen = [scores], {scores}
    while queue:
        value = queue.pop()
        if value.kind in ("contraction", "reduce"):
            continue
        numbers = [x for x in value.inputs if isinstance(x, int | float) and not isinstance(x, bool)]
        if value.kind == "source":
            if value.origin != "parameter" and any(size != 1 for size in value.shape):
                return value
        elif (
            (value.kind not in ("pointwise", "layout", "border") and value.name != "detach")
            or value.name == "where"
            or any(x <= NEVER for x in numbers)
        ):
            return value
        for x in value.operands:
            if x not in seen:
                seen.add(x)
                queue.append(x)
    return None
