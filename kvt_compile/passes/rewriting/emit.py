"""Writes nodes into a graph: axes in atoms -> reshape / permute / expand nodes, each with its fake value.

    base (B, N, H*D) as [(b), (i), (h, d)]   ->   reshape (B, N, H, D) . permute (B, H, N, D)

Only ATen overloads are written, so that the result is at home in Dynamo, symbolic_trace and export graphs alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from kvt_compile.passes.canonical.coords import Atom, Coord
from kvt_compile.passes.canonical.made import is_made, log_of_weight
from kvt_compile.passes.canonical.values import Value, dim_of, meta_value, product, same_shape
from kvt_compile.passes.finding.sizes import SizeSource, is_part, size_sources
from kvt_compile.passes.site import Operand

aten = torch.ops.aten
Group = tuple[Atom, ...]


class Emitter:
    """Inserts before one node.  `renamed` maps nodes that earlier rewrites replaced to their replacements, `viewed` are
    those that stay tensors that need a gradient where they are read without grad (flags.py), `copied` those that are
    read as copies (writes.py).  In inference mode, where nothing is recorded, tensors are detached as they are."""

    def __init__(
        self, graph: fx.Graph, before: fx.Node, like: fx.Node, renamed: dict[fx.Node, fx.Node],
        viewed: frozenset[fx.Node] = frozenset(), copied: frozenset[fx.Node] = frozenset(), inference: bool = False,
    ) -> None:  # fmt: skip
        self._graph, self._before, self._like, self._renamed = graph, before, like, renamed
        self._viewed, self._copied, self._inference = viewed, copied, inference
        self._copies: dict[fx.Node, fx.Node] = {}
        self._key = "example_value" if "example_value" in like.meta else "val"
        self._sizes: dict[Atom, SizeSource] = {}

    def node(self, node: fx.Node) -> fx.Node:
        """The node that now stands for `node`."""
        while node in self._renamed:
            node = self._renamed[node]
        return node

    def value(self, value: Value) -> fx.Node:
        """The node that now holds a value; behind a border no gradient comes to it."""
        if is_made(value):
            return self._made(value)
        assert value.holder is not None
        node = self.node(value.holder)
        if value.holder in self._copied:
            node = self._copy(node)
        if not isinstance(meta_value(node), torch.Tensor):
            return self._number(node)
        if value.kind != "border" or self._inference:
            return node
        return self._viewed_without_grad(node) if node in self._viewed else self.call(aten.detach.default, node)

    def _number(self, node: fx.Node) -> fx.Node:
        """A number that the graph computes, as the tensor that a kernel can be given."""
        result = next(x for x in pytree.tree_leaves(meta_value(self._like)) if isinstance(x, torch.Tensor))
        return self.call(aten.scalar_tensor.default, node, dtype=torch.float64, device=result.device)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self._copies:
            self._copies[node] = self.call(aten.clone.default, node)
        return self._copies[node]

    def _viewed_without_grad(self, node: fx.Node) -> fx.Node:
        self._switch_grad(False)
        view = self.call(aten.alias.default, node)
        self._switch_grad(True)
        return view

    def _switch_grad(self, on: bool) -> None:
        with self._graph.inserting_before(self._before):
            self._graph.call_function(torch._C._set_grad_enabled, (on,))

    def _made(self, value: Value) -> fx.Node:
        """What no node of the model holds, written down as it was read (`canonical/made.py`)."""
        inputs: list[Any] = [self.value(x) if isinstance(x, Value) else x for x in value.inputs]
        match value.name:
            case "permute":
                return self.call(aten.permute.default, *inputs, list(value.attrs["dims"]))
            case "reshape":
                return self.call(aten.reshape.default, *inputs, list(value.shape))
            case "where":
                first, second = (isinstance(x, fx.Node) for x in inputs[1:])
                target = aten.where.ScalarOther if first and not second else aten.where.ScalarSelf
                return self.call(aten.where.self if first and second else target, *inputs)
            case "mul" | "add":
                packet = getattr(aten, value.name)
                return self.call(packet.Tensor if isinstance(inputs[1], fx.Node) else packet.Scalar, *inputs)
            case "log" if value.attrs["fn"] is log_of_weight:
                return self._log_of_weight(inputs[0])
        return self.call(getattr(aten, value.name).default, *inputs)

    def _log_of_weight(self, x: fx.Node) -> fx.Node:
        nothing = self.call(aten.eq.Scalar, x, 0)
        safe = self.call(aten.log.default, self.call(aten.masked_fill.Scalar, x, nothing, 1.0))
        return self.call(aten.masked_fill.Scalar, safe, nothing, -math.inf)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call_function node with the fake value of its result and the origin of the node it stands for."""
        return self._create("call_function", target, args, kwargs)

    def again(self, node: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
        """The call of a function or a method that `node` is, with `new` in the place of `old`."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: new if n is old else n)
        return self._create(node.op, node.target, args, kwargs)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        new = self._placed(op, target, args, kwargs)
        with _fake_mode_of(args, self._like):
            (first, *rest), more = fx.map_arg((args, kwargs), meta_value)
            function = getattr(first, target) if op == "call_method" else target
            new.meta[self._key] = function(*rest, **more) if op == "call_method" else function(first, *rest, **more)
        return new

    def module(self, target: str, value: Any, *args: fx.Node) -> fx.Node:
        """A call_module node, whose result is known: it is not called here."""
        new = self._placed("call_module", target, args, {})
        new.meta[self._key] = value
        return new

    def _placed(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A node with the origin of the node it stands for."""
        with self._graph.inserting_before(self._before):
            new = self._graph.create_node(op, target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom", "kvt_names"):
            if key in self._like.meta:
                new.meta[key] = self._like.meta[key]
        return new

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def know_sizes(self, *operands: Operand) -> None:
        """Remembers where dynamic sizes can be read: dimensions of operands that are in the graph."""
        self._sizes = size_sources(operands)

    def size(self, atoms: Group) -> Any:
        """The product of the atoms' sizes: an int, or a node that holds it."""
        static = product(a.size for a in atoms if isinstance(a.size, int))
        result: Any = static
        for atom in atoms:
            if not isinstance(atom.size, int):
                factor = self._dynamic(atom)
                result = factor if isinstance(result, int) and result == 1 else self.call(operator.mul, result, factor)
        return result

    def _dynamic(self, atom: Atom) -> fx.Node:
        source = self._sizes[atom]
        assert source.operand.value.holder is not None
        size = self.call(aten.sym_size.int, self.node(source.operand.value.holder), source.dim)
        return size if not source.others else self.call(operator.floordiv, size, self.size(source.others))

    # ---- axes ------------------------------------------------------------------------------------------------------

    def operand(self, operand: Operand, groups: Sequence[Group]) -> fx.Node:
        """The operand as a tensor with one dimension per group; axes it lacks are expanded (stride 0)."""
        x = self.value(operand.value)
        for dim in range(len(operand.coords)):
            if is_part(operand, dim):
                x = self._part(x, dim, operand.coords[dim])
        x = self.arrange(*self._selected(x, [c.digits for c in operand.coords]), groups)
        fake = meta_value(x)
        return x if fake.dtype == operand.dtype else self.call(aten.to.dtype, x, operand.dtype)

    def _part(self, x: fx.Node, dim: int, coord: Coord) -> fx.Node:
        """The slice of a dimension that a coordinate runs over."""
        size = self.size(coord.digits)
        if isinstance(size, int):
            end = coord.start + coord.step * (size - 1) + 1
            return self.call(aten.slice.Tensor, x, dim, coord.start, end, coord.step)
        return self.call(aten.slice.Tensor, x, dim, coord.start, self.call(operator.add, size, coord.start))

    def _selected(self, x: fx.Node, dims: Sequence[Group]) -> tuple[fx.Node, list[Group]]:
        """Without the digits that are constants: (tensor, the atoms of its dimensions)."""
        if not any(a.fixed is not None for dim in dims for a in dim):
            return x, list(dims)
        atoms = [a for dim in dims for a in dim]
        if any(len(dim) != 1 for dim in dims):
            x = self._reshape(x, [(a,) for a in atoms])
        for position in reversed(range(len(atoms))):
            if atoms[position].fixed is not None:
                x = self.call(aten.select.int, x, position, atoms[position].fixed)
        return x, [(a,) for a in atoms if a.fixed is None]

    def arrange(self, x: fx.Node, dims: Sequence[Group], groups: Sequence[Group]) -> fx.Node:
        """From dimensions `dims` to dimensions `groups`, both in atoms."""
        have = [a for dim in dims for a in dim]
        if any(len(dim) != 1 for dim in dims):
            x = self._reshape(x, [(a,) for a in have])
        wanted = [a for group in groups for a in group if a in have]
        order = [have.index(a) for a in wanted]
        if order != list(range(len(order))):
            x = self.call(aten.permute.default, x, order)
        if any(0 < sum(a in have for a in group) < len(group) for group in groups):
            every = [a for group in groups for a in group]
            x = self.call(aten.reshape.default, x, [self.size((a,)) if a in have else 1 for a in every])
            x = self.call(aten.expand.default, x, [self.size((a,)) for a in every])
            return self._reshape(x, groups)
        present = [group if group and group[0] in have else () for group in groups]
        if any(len(group) != 1 for group in present):
            x = self._reshape(x, present)
        if any(group and not here for group, here in zip(groups, present, strict=True)):
            x = self.call(aten.expand.default, x, [self.size(group) for group in groups])
        return x

    def _reshape(self, x: fx.Node, groups: Sequence[Group]) -> fx.Node:
        return self.call(aten.reshape.default, x, [self.size(group) for group in groups])

    def like(self, x: fx.Node, original: fx.Node) -> fx.Node:
        """x in the memory order of the original's result, so that a later `view` still finds what it expects."""
        mine, theirs = meta_value(x), meta_value(original)
        if not isinstance(theirs, torch.Tensor):
            return x
        if same_shape(*(tuple(map(dim_of, y.stride())) for y in (mine, theirs))):
            return x
        order = sorted(range(theirs.dim()), key=lambda d: _hint(theirs.stride(d)), reverse=True)
        if any(_hint(s) == 0 for s in theirs.stride()):
            return x
        if order == list(range(theirs.dim())):
            return self.call(aten.contiguous.default, x)
        back = [order.index(d) for d in range(len(order))]
        x = self.call(aten.contiguous.default, self.call(aten.permute.default, x, order))
        return self.call(aten.permute.default, x, back)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1 << 30


@contextmanager
def _fake_mode_of(args: Any, like: fx.Node) -> Iterator[None]:
    """The fake mode the arguments live in (nodes know it; the tracing context may have moved on)."""
    found = [meta_value(node) for node in _nodes_in(args)] + pytree.tree_leaves(meta_value(like))
    mode = next((fake.fake_mode for fake in found if isinstance(fake, FakeTensor)), None)
    with mode or nullcontext():
        yield


def _nodes_in(args: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(args, nodes.append)
    return nodes
