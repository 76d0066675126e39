"""A softmax (or an SDPA call) -> the values around it that the finder reads, in program order.

q, k --> product --> scores --> softmax --> weights --> product with v
   back to the operands' own layout      forwards to the products that read the weights
"""

from __future__ import annotations

from kvt_compile.passes.canonical.text import canonical_text
from kvt_compile.passes.canonical.values import Value

_MOST = 200
"""Values on the way from the softmax to a product; what is farther is not looked for."""


def seen_text(anchor: Value) -> str:
    """The values around an anchor, one line each (`canonical/text.py`)."""
    return canonical_text(seen(anchor))


def seen(anchor: Value) -> list[Value]:
    """Everything between the products; below a product's operands, what only moves or changes single elements."""
    shown = _forwards(anchor)
    for value in list(shown):
        for operand in value.operands:
            _backwards(operand, int(value.kind not in ("contraction", "sdpa")), shown)
    return sorted(shown, key=lambda value: value.index)


def _forwards(anchor: Value) -> set[Value]:
    """The softmax, and what is on a way from it to a product that reads it; of an SDPA call itself."""
    if anchor.kind == "sdpa":
        return {anchor}
    reached, queue = {anchor}, [anchor]
    while queue and len(reached) < _MOST:
        for user in queue.pop(0).users:
            if user not in reached and user.kind not in ("softmax", "sdpa"):
                reached.add(user)
                if user.kind != "contraction":
                    queue.append(user)
    ends = [value for value in reached if value.kind == "contraction"]
    if not ends:
        return {anchor}
    on_a_way: set[Value] = set()
    while ends:
        value = ends.pop()
        on_a_way.add(value)
        ends += [x for x in value.operands if x in reached and x not in on_a_way]
    return on_a_way


def _backwards(value: Value, products: int, shown: set[Value]) -> None:
    """Adds the value and what it is made of, through so many products more."""
    if value in shown:
        return
    shown.add(value)
    operands = list(value.operands)
    if value.kind == "contraction":
        products -= 1
        follow = products >= 0
    elif products:
        follow = value.kind != "opaque"
    else:  # of queries, keys and values: what is laid out anew, scaled or cast
        follow = value.kind in ("layout", "pointwise", "select_by") and len(operands) == 1
    for operand in operands if follow else ():
        _backwards(operand, max(products, 0), shown)
