"""`given(function)` in a graph: the function is called on q and k as the site's operator gets them.

    kvt.attention(q, k, v, [], "0.125*s", ...)
      ->  found = self.predictor(q, k)                      the user's module, or a function as one (`Called`)
          tensors = self.kvt_condition_0(q, k, found)       which keys are kept, as the score reads it
          kvt.attention(q, k, v, [tensors[0]], "where(c0[b, h, i, j], 0.125*s, -oo)", ...)

That the functions can be called so was seen while the site was decided (`trial.py`).
"""

from __future__ import annotations

import operator
from typing import Any
from uuid import uuid4

from torch import Tensor, fx, nn

from kvt_compile.passes.rewriting.called import Called
from kvt_compile.passes.rewriting.emit import Emitter
from kvt_compile.passes.selecting import Selected
from kvt_compile.select.function import Condition, conditioned, givens
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import SelectionError, Selector

GIVEN = "kvt_given"
"""What the children of a graph module are called that are functions of selections; a number follows."""


class ConditionTensors(nn.Module):
    """(q, k, what each function returned) -> the tensors that a node's condition reads, all of them bool."""

    def __init__(self, whole: Selector, geometry: Geometry, condition: Condition, score: str) -> None:
        super().__init__()
        self.whole, self.geometry, self.condition = whole, geometry, condition
        self.score = score
        """The node's score without the condition."""
        self.mark = uuid4().hex
        """A compile cache that goes by what modules hold takes no graph with functions for another: what they do is in
        no text."""

    def forward(self, q: Tensor, k: Tensor, *found: Any) -> tuple[Tensor, ...]:
        condition, tensors = conditioned(self.whole, found, q, k, self.geometry, self.condition.dims)
        if condition != self.condition:
            raise SelectionError(
                f"{self.whole} returned something else than when it was built in: then {self.condition.text!r} was "
                f"read of it, now it would be {condition.text!r}"
            )
        return tuple(tensors)

    def extra_repr(self) -> str:
        return str(self.whole)


def build_in(
    gm: fx.GraphModule, emit: Emitter, select: Selected, q: fx.Node, k: fx.Node, score: str, captured: int
) -> tuple[str, list[fx.Node]]:
    """(the score under what functions decide, the nodes of the tensors that it captures for that)"""
    functions = select.functions
    assert functions is not None
    assert functions.condition is not None
    condition = functions.condition
    found = [
        emit.module(_place_of(gm, x.function), fake, q, k)
        for x, fake in zip(givens(functions.whole), functions.returned, strict=True)
    ]
    name = _new_name(gm, "kvt_condition")
    gm.add_submodule(name, ConditionTensors(functions.whole, select.geometry or Geometry(()), condition, score))
    tensors = emit.module(name, functions.tensors, q, k, *found)
    loads = [emit.call(operator.getitem, tensors, n) for n in range(len(functions.tensors))]
    return condition.around(score, captured), loads


def _place_of(gm: fx.GraphModule, wanted: Any) -> str:
    """Where a function stands in a graph module: where it is already, so that its state has one name."""
    for path, module in gm.named_modules():
        if module is wanted or (isinstance(module, Called) and module.calls(wanted)):
            return str(path)
    name = _new_name(gm, GIVEN)
    gm.add_submodule(name, wanted if isinstance(wanted, nn.Module) else Called(wanted))
    return name


def _new_name(gm: fx.GraphModule, kind: str) -> str:
    number = 0
    while hasattr(gm, f"{kind}_{number}"):
        number += 1
    return f"{kind}_{number}"


def put_in(gm: fx.GraphModule, node: fx.Node, select: Selected) -> None:
    """What functions decide, into a `kvt::attention` node that has no such condition."""
    q, k, v, captured, score, *rest = node.args
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    before: Any = captured or ()
    score, tensors = build_in(gm, Emitter(gm.graph, node, node, {}), select, q, k, str(score), len(before))
    node.args = (q, k, v, [*before, *tensors], score, *rest)


def taken_out(gm: fx.GraphModule, node: fx.Node) -> None:
    """A `kvt::attention` node without what functions decide, and the graph without what only served that."""
    captured: Any = node.args[3]
    rest, score = [], node.args[4]
    dead: dict[fx.Node, None] = {}
    for x in captured or ():
        made_by = x.args[0] if x.target is operator.getitem else x
        module = gm.get_submodule(str(made_by.target)) if made_by.op == "call_module" else None
        if isinstance(module, ConditionTensors):
            score = module.score
            dead |= dict.fromkeys((x, made_by, *made_by.args[2:]))
        else:
            rest.append(x)
    node.args = (*node.args[:3], rest, score, *node.args[5:])
    for old in sorted(dead, reverse=True):
        if not old.users:
            gm.graph.erase_node(old)
    used = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    for name, child in list(gm.named_children()):
        ours = isinstance(child, ConditionTensors) or name.startswith(f"{GIVEN}_")
        if ours and not any(str(x).split(".")[0] == name for x in used):
            gm.delete_submodule(name)
