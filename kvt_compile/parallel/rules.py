"""The four operators on DTensors: what is whole stays whole, what is cut is cut along batch, heads or queries.

    arguments of the operator, DTensors  ->  a layout (`layout.choose`)  ->  shards  ->  the operator  ->  DTensors

Keys are never cut: a row's threshold is over all of them.  Placements that no layout has are redistributed.  What a
shard cannot know by itself goes with it: where its coordinates begin (`coordinates.of_shard`), and which dropout it
draws (the operator's `draw`), so that the result is that of one process for every placement.

Registered with `torch.library.register_torch_dispatch`.  `torch.distributed.tensor.experimental.register_sharding`
cannot say these things: it hands every rank the same numbers and texts, its cache of decisions does not look at texts,
and it has no results that are lists of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree

from kvt_compile.kernels.dropout import place_of_draws
from kvt_compile.kernels.language import limits
from kvt_compile.kernels.op import ops
from kvt_compile.kernels.op.arguments import AttentionArguments, BackwardArguments, SoftmaxArguments
from kvt_compile.kernels.op.captured import check_captured
from kvt_compile.kernels.op.check import check_attention, check_backward
from kvt_compile.kernels.op.selection import counts_heads
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.parallel import coordinates
from kvt_compile.parallel.dtensors import agreed, mesh_of, on_mesh, shard, whole
from kvt_compile.parallel.layout import Layout, Operand, choose, first_of, result_placements

ROWS = {"b": 0, "h": 1, "i": 2}
"""Dimensions of q and of what has a number for every query."""
KEYS = {"b": 0, "h": 1}
_OF_ROWS = ("q", "out", "logsumexp", "threshold", "grad_out")
_UNDERSTOOD = {"k", "v", "captured", "score", "weight", "topk", "sizes", "dropout_p", "seed", "lowering", "tolerance"}
_UNDERSTOOD |= {*_OF_ROWS, "draw", "needs_grad", "select", "grid", "prefix"}
"""Arguments whose meaning for a shard is known here."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut."""

    mesh: DeviceMesh
    layout: Layout
    operands: Mapping[str, Operand]
    local: coordinates.Local

    def wrapped(self, result: Tensor, shape: Sequence[int], dims: Mapping[str, int]) -> DTensor:
        return whole(result, shape, self.mesh, result_placements(dims, self.layout))


def _captured_name(slot: int) -> str:
    return f"captured tensor {slot}"


def _plan(name: str, a: AttentionArguments) -> Plan:
    """Checks a call as a whole and decides how it is cut."""
    check_attention(a)
    captured = list(a.captured or ())
    extents = {"b": a.q.shape[0], "h": a.q.shape[1], "i": a.q.shape[2], "j": a.k.shape[2]}
    if captured and 0 not in extents.values() and all(isinstance(x, int) for x in extents.values()):
        spec = KernelSpec.of(a.q, a.k, a.v, captured, a.score, a.weight, len(a.sizes or ()), a.dropout_p)
        check_captured(spec, [x.shape for x in captured], extents)
    named: dict[str, tuple[Tensor, Mapping[str, int]]] = {"q": (a.q, ROWS), "k": (a.k, KEYS), "v": (a.v, KEYS)}
    for field in _OF_ROWS[1:]:
        if isinstance(a, BackwardArguments):
            named[field] = (getattr(a, field), ROWS)
    for slot, tensor in enumerate(captured):
        dims = {axis: coordinates.dimension_of((a.score, a.weight), slot, axis) for axis in coordinates.AXES}
        # a table may be longer than the axis that reads it: then a shard of it is not what a shard reads
        fitting = {x: dim for x, dim in dims.items() if dim is not None and tensor.shape[dim] == extents[x]}
        named[_captured_name(slot)] = (tensor, fitting)
    mesh = mesh_of(name, [*(x for x, _ in named.values()), a.seed])
    operands = {x: Operand(on_mesh(name, x, tensor, mesh), dims) for x, (tensor, dims) in named.items()}
    layout = choose(list(operands.values()), _axes(a), lambda parts: _is_exact(parts, extents, a.k.shape[1]))
    local = frozenset(
        (slot, axis, operands[_captured_name(slot)].dims[axis])
        for slot in range(len(captured))
        for axis in layout
        if axis in operands[_captured_name(slot)].dims
    )
    return Plan(mesh, layout, operands, local)


def _axes(a: AttentionArguments) -> tuple[str, ...]:
    """What a call may be cut along."""
    if len(a.sizes or ()) + len(coordinates.AXES) > limits.SLOTS:
        return ()
    if a.select:  # its grid is that of all tokens
        return ("b",) if counts_heads(a.select) else ("b", "h")
    # an argument that this file does not know may speak of rows and keys by number: those stay whole
    others = [x for x in dataclasses.fields(a) if x.name not in _UNDERSTOOD]
    return ("b", "h") if any(getattr(a, x.name) not in (None, x.default) for x in others) else coordinates.AXES


def _is_exact(parts: Mapping[str, int], extents: Mapping[str, int], kv_heads: int) -> bool:
    if any(extents[axis] < ranks for axis, ranks in parts.items()):
        return False  # a rank would have nothing
    # query heads and the key heads they share are cut at the same places only where every part is as large
    return "h" not in parts or bool(extents["h"] == kv_heads) or bool(kv_heads % parts["h"] == 0)


def _on_shards(func: Callable[..., Any], a: AttentionArguments, plan: Plan) -> Any:
    """The operator on what this rank has."""
    mesh, layout = plan.mesh, plan.layout
    place = mesh.get_coordinate()
    if place is None:
        return _of_no_rank(a)
    local = {x: shard(operand.tensor, operand.wanted(layout)) for x, operand in plan.operands.items()}
    shape = [mesh.size(dim) for dim in range(mesh.ndim)]
    first = {
        axis: first_of(axis, a.q.shape[ROWS[axis]], layout, shape, place) for axis in coordinates.AXES if axis in layout
    }
    (score, weight), sizes = coordinates.of_shard((a.score, a.weight), first, plan.local, a.sizes or ())
    changes: dict[str, Any] = {x: tensor for x, tensor in local.items() if not x.startswith("captured")}
    changes["captured"] = [local[_captured_name(slot)] for slot in range(len(a.captured or ()))]
    changes |= {"score": score, "weight": weight, "sizes": sizes}
    if a.dropout_p > 0.0:
        changes |= {"seed": agreed(a.seed, mesh), "draw": _draw(a, first)}
    return func(*_in_order(func, dataclasses.replace(a, **changes)))


def _of_no_rank(a: AttentionArguments) -> Any:
    """What a rank that is not of the mesh has of the results: nothing, of their dtypes, as of torch's own operators."""
    if isinstance(a, BackwardArguments):
        q, k, v, *captured = (torch.empty(0, dtype=x.dtype) for x in (a.q, a.k, a.v, *(a.captured or ())))
        return q, k, v, captured
    rows = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    return tuple(torch.empty(0, dtype=dtype) for dtype in (a.v.dtype, rows, rows))


def _draw(a: AttentionArguments, first: Mapping[str, int]) -> list[int]:
    """The `draw` of a shard."""
    begin, *per = place_of_draws(a.q.shape[:3], a.k.shape[2], a.draw)
    steps = dict(zip(coordinates.AXES, per, strict=True))
    return [begin + sum(start * steps[axis] for axis, start in first.items()), *per]


def _in_order(func: Callable[..., Any], a: Any) -> list[Any]:
    """A record as the operator's arguments; tensors this file knows nothing of are whole."""
    values = [getattr(a, x.name) for x in func._schema.arguments]  # type: ignore[attr-defined]
    whole_ones = pytree.tree_map_only(DTensor, lambda x: shard(x, [Replicate()] * x.device_mesh.ndim), values)
    return list(whole_ones)


def _attention(func: Callable[..., Any], a: AttentionArguments) -> tuple[DTensor, ...]:
    plan = _plan("attention", a)
    out, logsumexp, threshold = _on_shards(func, a, plan)
    rows = a.q.shape[:3]
    return (
        plan.wrapped(out, (*rows, a.v.shape[3]), ROWS),
        plan.wrapped(logsumexp, rows, ROWS),
        plan.wrapped(threshold, rows, ROWS),
    )


def _attention_backward(
    func: Callable[..., Any], a: BackwardArguments
) -> tuple[DTensor, DTensor, DTensor, list[DTensor]]:
    check_backward(a)
    plan = _plan("attention_backward", a)
    dq, dk, dv, dcaptured = _on_shards(func, a, plan)
    names = ["q", "k", "v", *map(_captured_name, range(len(dcaptured)))]

    def wrapped(gradient: Tensor, name: str, needed: bool) -> DTensor:
        if not needed:
            return whole(gradient, (0,), plan.mesh, [Replicate()] * plan.mesh.ndim)
        operand = plan.operands[name]
        return plan.wrapped(gradient, operand.tensor.shape, operand.dims)

    full = [wrapped(*x) for x in zip((dq, dk, dv, *dcaptured), names, a.needs_grad, strict=True)]
    return full[0], full[1], full[2], full[3:]


def _topk_softmax(func: Callable[..., Any], a: Any) -> DTensor:
    """Rows are independent: along every dimension but that of the softmax."""
    name = func._schema.name.removeprefix("kvt::")  # type: ignore[attr-defined]
    tensors = {x: getattr(a, x) for x in ("scores", "grad", "weights") if hasattr(a, x)}
    first = next(iter(tensors.values()))
    mesh, rank = mesh_of(name, list(tensors.values())), first.dim()
    dims = {str(d): d for d in range(rank) if d != a.dim % max(rank, 1)}
    operands = {x: Operand(on_mesh(name, x, tensor, mesh), dims) for x, tensor in tensors.items()}

    def is_exact(parts: Mapping[str, int]) -> bool:
        return not any(first.shape[int(axis)] < ranks for axis, ranks in parts.items())

    layout = choose(list(operands.values()), list(dims), is_exact)
    if mesh.get_coordinate() is None:
        dtype = a.dtype if isinstance(a, SoftmaxArguments) else a.input_dtype
        return whole(torch.empty(0, dtype=dtype), first.shape, mesh, result_placements(dims, layout))
    local = {x: shard(operand.tensor, operand.wanted(layout)) for x, operand in operands.items()}
    result = func(*_in_order(func, dataclasses.replace(a, **local)))
    return whole(result, first.shape, mesh, result_placements(dims, layout))


_RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (ops.attention_arguments, _attention),
    "attention_backward": (ops.backward_arguments, _attention_backward),
    "topk_softmax": (ops.softmax_arguments, _topk_softmax),
    "topk_softmax_backward": (ops.softmax_backward_arguments, _topk_softmax),
}


def register() -> None:
    """Gives each operator its rule for DTensors."""
    for name, (bind, rule) in _RULES.items():
        torch.library.register_torch_dispatch(f"kvt::{name}", DTensor, _of(bind, rule), lib=ops.LIBRARY)


def _of(bind: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    def run(_cls: type, func: Callable[..., Any], _types: Any, args: Sequence[Any], kwargs: Any = None) -> Any:
        with torch.no_grad():  # autograd is above: it calls the backward operator on DTensors by itself
            return rule(func, bind(*args, **(kwargs or {})))

    return run
