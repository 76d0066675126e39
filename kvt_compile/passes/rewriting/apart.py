"""A product with a sum of maps -> a sum of products, in place, until it is known whether that was worth it.

(a1 - lam*a2) @ v   ->   a1 @ v - (lam*a2) @ v        and back, where no kernel takes the place of any of them
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from kvt_compile.passes.canonical.modes import Mode, running_as
from kvt_compile.passes.canonical.values import Value, dim_of, meta_value, same_shape
from kvt_compile.passes.finding.sums import Normalised, Rearranged, Scaled, Step, SumOfMaps, Term
from kvt_compile.passes.rewriting.emit import Emitter

aten = torch.ops.aten


@dataclass
class Apart:
    """What was written for one product."""

    old: SumOfMaps
    made: list[fx.Node]
    products: list[fx.Node] = field(default_factory=list)
    """One for each map."""

    def is_worth_it(self, fused: Collection[fx.Node]) -> bool:
        """Whether a kernel takes the place of one of its products."""
        return any(product in fused for product in self.products)

    def restore(self) -> None:
        """Puts the model's own product back."""
        self.made[-1].replace_all_uses_with(self.old.product.node)
        _erase(self.made)

    def settle(self) -> None:
        """Erases the model's own product, and what only it was made of."""
        node = self.old.product.node
        dead = {node, *self.old.dead}
        _erase([n for n in node.graph.nodes if n in dead])


def take_apart(graph: fx.Graph, sums: Sequence[SumOfMaps], modes: dict[fx.Node, Mode]) -> list[Apart]:
    """Writes every sum of products behind the product it stands for, which nobody reads any more."""
    written = []
    for one in sums:
        with running_as(modes[one.product.node]):
            if (apart := _written(graph, one)) is not None:
                written.append(apart)
    return written


def _written(graph: fx.Graph, one: SumOfMaps) -> Apart | None:
    node = one.product.node
    before = set(graph.nodes)
    emit = Emitter(graph, node.next, node, {})
    apart = Apart(one, [])
    users = list(node.users)
    try:
        out = _sum_of_products(emit, one, apart)
    except RuntimeError:  # a view that the memory of this map does not allow
        out = None
    apart.made = [n for n in graph.nodes if n not in before]
    if out is None or not _alike(out, node):
        _erase(apart.made)
        return None
    for user in users:
        user.replace_input_with(node, out)
    return apart


def _alike(out: fx.Node, node: fx.Node) -> bool:
    mine, theirs = meta_value(out), meta_value(node)
    return bool(mine.dtype == theirs.dtype and same_shape(*(tuple(map(dim_of, x.shape)) for x in (mine, theirs))))


def _sum_of_products(emit: Emitter, one: SumOfMaps, apart: Apart) -> fx.Node:
    node = one.product.node
    out: fx.Node | None = None
    for term in one.terms:
        product = emit.again(node, one.weights, _weights(emit, term))
        apart.products.append(product)
        if out is not None:
            out = emit.call((aten.sub if term.negative else aten.add).Tensor, out, product)
        else:
            out = emit.call(aten.neg.default, product) if term.negative else product
    assert out is not None
    return emit.like(out, node)


def _weights(emit: Emitter, term: Term) -> fx.Node:
    weights = emit.value(term.map)
    for step in term.steps:
        weights = _after(emit, weights, step)
    return weights


def _after(emit: Emitter, x: fx.Node, step: Step) -> fx.Node:
    if isinstance(step, Rearranged):
        return emit.again(step.node, step.old, x)
    if isinstance(step, Scaled):
        return _scaled(emit, x, _held(emit, step.by), step.divides)
    if isinstance(step, Normalised):
        return _scaled(emit, x, _sum_of_factors(emit, step), divides=True)
    return emit.call(aten.to.dtype, x, step)


def _held(emit: Emitter, by: Value | float) -> fx.Node | float:
    return emit.value(by) if isinstance(by, Value) else by


def _scaled(emit: Emitter, x: fx.Node, by: fx.Node | float, divides: bool) -> fx.Node:
    packet = aten.div if divides else aten.mul
    return emit.call(packet.Tensor if isinstance(by, fx.Node) else packet.Scalar, x, by)


def _sum_of_factors(emit: Emitter, step: Normalised) -> fx.Node | float:
    """What every row of the whole sums up to, as a number or as what is broadcast along the rows."""
    total: fx.Node | float = step.plus
    for negative, scales in step.factors:
        factor = _factor(emit, scales)
        if isinstance(factor, fx.Node):
            factor = emit.call(aten.neg.default, factor) if negative else factor
            same = isinstance(total, fx.Node)
            adds = aten.add.Tensor if same else aten.add.Scalar
            total = factor if not same and total == 0.0 else emit.call(adds, factor, total)
        else:
            factor = -factor if negative else factor
            total = emit.call(aten.add.Scalar, total, factor) if isinstance(total, fx.Node) else total + factor
    return total


def _factor(emit: Emitter, scales: Sequence[Scaled]) -> fx.Node | float:
    factor: fx.Node | float = 1.0
    for scale in scales:
        by = _held(emit, scale.by)
        if isinstance(factor, fx.Node):
            factor = _scaled(emit, factor, by, scale.divides)
        elif not isinstance(by, fx.Node):
            factor = factor / by if scale.divides else factor * by
        elif scale.divides:
            factor = _scaled(emit, emit.call(aten.reciprocal.default, by), factor, divides=False)
        else:
            factor = by if factor == 1.0 else _scaled(emit, by, factor, divides=False)
    return factor


def _erase(nodes: Sequence[fx.Node]) -> None:
    """Those that nobody reads, last first."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)
