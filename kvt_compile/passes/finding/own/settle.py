"""A canonical graph of which some values got other inputs -> who reads what now, and what nobody reads any more."""

from __future__ import annotations

from collections.abc import Iterable

from kvt_compile.passes.canonical.canonicalise import CanonicalGraph, forget_unused
from kvt_compile.passes.canonical.values import Value


def made_of(values: Iterable[Value]) -> set[Value]:
    """The values and what is computed of them, products left out."""
    found = set(values)
    queue = list(found)
    while queue:
        for user in queue.pop().users:
            if user not in found and user.kind not in ("contraction", "sdpa"):
                found.add(user)
                queue.append(user)
    return found


def settle(graph: CanonicalGraph) -> frozenset[Value]:
    """Brings the users up to date; the values that nobody reads any more, and what was made of them for nobody.

    They are marked: a softmax among them is no anchor.
    """
    before = {value for value in graph.values if value.users}
    for value in graph.values:
        value.users = []
    for value in graph.values:
        for operand in value.operands:
            operand.users.append(value)
    forget_unused(graph)
    outputs = set(graph.outputs)
    dead: set[Value] = set()
    for value in graph.values:
        unread = not value.users and value not in outputs
        if unread and (value in before or any(x in dead for x in value.operands)):
            dead.add(value)
    for value in dead:
        value.attrs["absorbed"] = True
    return frozenset(dead)
