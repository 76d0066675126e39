"""Tensors -> tensors: packs the argument structure and calls the built kernel.

Outputs are allocated here; a kernel allocates only its threads' scratch memory, O(Nk) each.  Nothing is copied: strides
go to the kernel as they are.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.c import cache
from kvt_compile.kernels.c.generate import MOST_KEYS, source
from kvt_compile.kernels.c.gradients import separated_axes
from kvt_compile.kernels.c.layout import DRAW, MATRICES, SOFTMAX_FIELDS, call_fields, shape_fields
from kvt_compile.kernels.c.settings import Settings
from kvt_compile.kernels.c.toolchain import BuildError
from kvt_compile.kernels.dropout import keep_scale
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.captured import check_captured
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.op.ready import Runner
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.remember import remembered
from kvt_compile.kernels.tiles import TileLists, tables_of, tile_lists

Arguments = dict[str, int | float]
Plan = dict[str, int]
Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor."""
TASKS = 12
"""A backward with fewer (batch, head) pairs also splits the queries, at the price of partial sums of dk and dv.  Shapes
alone decide, so that results do not depend on the number of threads."""
NO_MEMORY = "a k-NN attention kernel found no memory for its scratch space"


class Kernel:
    """The built library of one spec, ready to be called."""

    def __init__(self, spec: KernelSpec | SoftmaxSpec, settings: Settings) -> None:
        self.spec = spec
        self.library = cache.load(source(spec), settings)
        named = SOFTMAX_FIELDS if isinstance(spec, SoftmaxSpec) else call_fields(spec)
        self._names = tuple(name for _, name in named)
        self._layout = _struct(named)
        self.lanes = int(self.library.kvt_lanes()) if isinstance(spec, KernelSpec) and spec.select else 0
        """Queries in a tile, of a kernel with lists."""

    def call(self, entry: str, arguments: Arguments, shapes: bytes = b"") -> None:
        """Run an entry point; an argument not given is 0.  Raises MemoryError when it finds no scratch memory."""
        packed = self._layout.pack(*(arguments.get(name, 0) for name in self._names)) + shapes
        if getattr(self.library, entry)(packed):
            raise MemoryError(NO_MEMORY)


def _struct(named: Sequence[tuple[str, str]]) -> struct.Struct:
    return struct.Struct("=" + "".join("d" if ctype == "double" else "q" for ctype, _ in named))


@remembered(1024, BuildError)
def kernel(spec: KernelSpec | SoftmaxSpec, settings: Settings) -> Kernel:
    """The kernel of a spec; forward and backward, whatever needs a gradient, are one library.

    Raises BuildError; what failed is not tried again in this process."""
    if isinstance(spec, KernelSpec) and spec.needs_grad:
        return kernel(dataclasses.replace(spec, needs_grad=()), settings)
    return Kernel(spec, settings)


def forward(call: AttentionCall, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logsumexp, threshold) as `Lowering.forward`."""
    out = call.q.new_empty((*call.rows, call.spec.value_dim), dtype=call.v.dtype)
    logsumexp, threshold = (call.q.new_empty(call.rows, dtype=call.spec.accumulate) for _ in range(2))
    if call.keys == 0:
        return out.zero_(), logsumexp.fill_(-torch.inf), threshold.fill_(-torch.inf)
    if 0 not in call.rows:
        lists = _lists(call, settings)
        arguments = _arguments(call, lists)
        arguments |= {"out": out.data_ptr(), "lse": logsumexp.data_ptr(), "threshold": threshold.data_ptr()}
        _launch(call, settings, "kvt_forward", arguments)
    return out, logsumexp, threshold


def runner(call: AttentionCall, settings: Settings) -> Runner | None:
    """What runs a forward laid out as `call`, which has no dropout; None where there is nothing to compute."""
    if 0 in (*call.rows, call.keys):
        return None
    matrices, captured_layouts = _layouts(call.q, call.k, call.v), _layouts(*call.captured)
    shapes = _shapes(call.spec, matrices, captured_layouts, call.topk, tuple(call.sizes))
    entry = kernel(call.spec, settings).library.kvt_forward
    slots = {f"c{n}" for n in range(len(call.captured))}
    given = {"q", "k", "v", "out", "lse", "threshold", "threads"} | slots
    pack = struct.Struct("=" + "".join("q" if name in given else "8x" for _, name in call_fields(call.spec))).pack
    rows, result = tuple(call.rows), (*call.rows, call.spec.value_dim)
    # a dtype that is given costs a third of a microsecond
    of_values: dict[str, Any] = {} if call.v.dtype == call.q.dtype else {"dtype": call.v.dtype}
    of_rows: dict[str, Any] = {} if call.spec.accumulate == call.q.dtype else {"dtype": call.spec.accumulate}

    def run(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        new = q.new_empty
        out, logsumexp, threshold = new(*result, **of_values), new(*rows, **of_rows), new(*rows, **of_rows)
        pointers = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if 0 in pointers:
            pointers = _pointer("q", q), _pointer("k", k), _pointer("v", v)
        more = [c.data_ptr() or _pointer(f"c{n}", c) for n, c in enumerate(captured)]
        results = out.data_ptr(), logsumexp.data_ptr(), threshold.data_ptr()
        if entry(pack(*pointers, *results, torch.get_num_threads(), *more) + shapes):
            raise MemoryError(NO_MEMORY)
        return out, logsumexp, threshold

    return run


def backward_runner(call: AttentionCall, settings: Settings, grad_out: Tensor) -> Runner | None:
    """What runs a backward laid out as `call`, which has no dropout, and `grad_out`, with logsumexp and threshold
    contiguous; None where there is nothing to compute.  A gradient that is not wanted is an empty tensor."""
    if 0 in (*call.rows, call.keys):
        return None
    spec, wanted = call.spec, call.spec.needs_grad
    shapes = _shapes(
        spec, _layouts(call.q, call.k, call.v, grad_out), _layouts(*call.captured), call.topk, tuple(call.sizes)
    )
    entry = kernel(spec, settings).library.kvt_backward
    copies = _copies(spec, call)
    inputs = ["q", "k", "v", *(f"c{n}" for n in range(len(call.captured)))]
    results = [name for name, need in zip(inputs, wanted, strict=True) if need]
    given = {*inputs, *(f"d{name}" for name in results), "grad_out", "lse", "threshold", "threads"}
    names = [name for _, name in call_fields(spec) if name in given]
    pack = struct.Struct("=" + "".join("q" if name in given else "8x" for _, name in call_fields(spec))).pack

    def run(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor],
        out: Tensor, logsumexp: Tensor, threshold: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        tensors = dict(zip(inputs, (q, k, v, *captured), strict=True))
        made = {
            f"d{name}": q.new_zeros((copies, *tensors[name].shape), dtype=spec.accumulate)
            if name[0] == "c"
            else torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
            for name in results
        }
        tensors |= {"grad_out": grad_out, "lse": logsumexp, "threshold": threshold} | made
        places: dict[str, int] = {name: x.data_ptr() or _pointer(name, x) for name, x in tensors.items()}
        places["threads"] = torch.get_num_threads()
        if entry(pack(*(places[name] for name in names)) + shapes):
            raise MemoryError(NO_MEMORY)
        gradients = [
            x.new_empty(0) if not need else made[f"d{name}"] if name[0] != "c" else made[f"d{name}"].sum(0).to(x.dtype)
            for name, x, need in zip(inputs, (q, k, v, *captured), wanted, strict=True)
        ]
        return gradients[0], gradients[1], gradients[2], gradients[3:]

    return run


def _copies(spec: KernelSpec, call: AttentionCall) -> int:
    """How many partial sums of a captured tensor's gradient a backward makes."""
    plan = backward_plan(spec, call.q.shape, call.k.shape, tuple(c.numel() for c in call.captured))
    return plan["tasks"] if plan["copies"] else 1


def backward(
    call: AttentionCall, settings: Settings, grad_out: Tensor, logsumexp: Tensor, threshold: Tensor
) -> Gradients:
    """(dq, dk, dv, dcaptured) as `Lowering.backward`."""
    wanted = call.spec.needs_grad
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype) if need else None
        for x, need in zip((call.q, call.k, call.v), wanted, strict=False)
    )
    captured = list(zip(call.captured, wanted[3:], strict=True))
    if 0 in (*call.rows, call.keys):
        for x in (dq, dk, dv):
            if x is not None:
                x.zero_()
        return dq, dk, dv, [torch.zeros(c.shape, dtype=c.dtype) if need else None for c, need in captured]
    copies = _copies(call.spec, call)
    sums = [torch.zeros((copies, *c.shape), dtype=call.spec.accumulate) if need else None for c, need in captured]
    # the kernel reads rows one after the other; vmap saves them with a stride of 0
    logsumexp, threshold = logsumexp.contiguous(), threshold.contiguous()
    lists = _lists(call, settings)
    arguments = _arguments(call, lists)
    arguments |= {
        "grad_out": _pointer("grad_out", grad_out),
        "lse": logsumexp.data_ptr(),
        "threshold": threshold.data_ptr(),
    }
    arguments |= {name: x.data_ptr() for name, x in (("dq", dq), ("dk", dk), ("dv", dv)) if x is not None}
    arguments |= {f"dc{n}": x.data_ptr() for n, x in enumerate(sums) if x is not None}
    _launch(call, settings, "kvt_backward", arguments, grad_out)
    dcaptured = [None if x is None else x.sum(0).to(c.dtype) for x, c in zip(sums, call.captured, strict=True)]
    return dq, dk, dv, dcaptured


def _launch(call: AttentionCall, settings: Settings, entry: str, arguments: Arguments, *more: Tensor) -> None:
    matrices = _layouts(call.q, call.k, call.v, *more)
    shapes = _shapes(call.spec, matrices, _layouts(*call.captured), call.topk, tuple(call.sizes))
    kernel(call.spec, settings).call(entry, arguments, shapes)


@lru_cache(maxsize=1024)
def _backward_plan(
    spec: KernelSpec, batch: int, kv_heads: int, queries: int, small: bool
) -> tuple[tuple[str, int], ...]:
    captured_grad = any(spec.needs_grad[3:])
    split = frozenset("bhi") if small or not captured_grad else separated_axes(spec, spec.needs_grad)
    tasks = (batch if "b" in split else 1) * (kv_heads if "h" in split else 1)
    chunks = max(1, min(-(-TASKS // tasks), -(-queries // 64))) if "i" in split else 1
    plan = {
        "chunks": chunks,
        "split_b": int("b" in split),
        "split_h": int("h" in split),
        "split_chunks": int("i" in split),
        "copies": int(small and captured_grad),
        "tasks": tasks * chunks,
    }
    return tuple(plan.items())


def backward_plan(
    spec: KernelSpec, q_shape: Sequence[int], k_shape: Sequence[int], captured_sizes: Sequence[int]
) -> Plan:
    """How a backward is cut into tasks.  Small captured gradients get a copy per task, added up in order afterwards;
    large ones are shared, and only tasks that cannot meet in an element run beside each other."""
    batch, _, queries, dim = q_shape
    heads, keys = k_shape[1:3]
    gradients = sum(n for n, need in zip(captured_sizes, spec.needs_grad[3:], strict=True) if need)
    copies = batch * heads * max(1, min(-(-TASKS // (batch * heads)), -(-queries // 64)))
    small = gradients * copies <= max(batch * heads * (queries + keys) * dim, 1 << 16)
    return dict(_backward_plan(spec, batch, heads, queries, small))


_LISTED = {
    "lane_query": "query",
    "lane_count": "count",
    "list_start": "list_start",
    "list_block": "block",
    "block_start": "block_start",
    "run": "run",
    "bits": "bits",
}
"""Field of the argument structure -> array of the lists."""


def _lists(call: AttentionCall, settings: Settings) -> TileLists | None:
    """Which keys each tile computes; None: all."""
    if call.selection is None or call.selection.allowed is None:
        return None
    return tile_lists(call.selection, call.q, call.k, kernel(call.spec, settings).lanes, tables_of(call))


def _arguments(call: AttentionCall, lists: TileLists | None) -> Arguments:
    tensors = {"q": call.q, "k": call.k, "v": call.v} | {f"c{n}": c for n, c in enumerate(call.captured)}
    arguments: Arguments = {name: _pointer(name, x) for name, x in tensors.items()}
    arguments["threads"] = torch.get_num_threads()
    if lists is not None:
        arguments |= {name: getattr(lists, field).data_ptr() for name, field in _LISTED.items()}
        arguments |= {"tiles": lists.tiles, "longest": lists.longest}
        arguments |= {"own_tiles": lists.tiles if lists.own_lanes else 0}
        arguments |= {"per_batch": lists.per_batch, "per_head": lists.per_head}
    if call.seed is not None:
        arguments["seed"] = int(call.seed.item())
        arguments |= zip(DRAW, call.draw, strict=True)
        arguments["drop_below"] = int(call.dropout_p * 2**32)
        arguments["keep_scale"] = keep_scale(call.dropout_p)
    return arguments


def _pointer(name: str, x: Tensor) -> int:
    """Where a tensor lies."""
    place = x.data_ptr()
    if not place and x.numel():
        raise ValueError(f"{name} has no memory: its storage was freed while the tensor was still in use")
    return place


def _layouts(*tensors: Tensor) -> tuple[Layout, ...]:
    return tuple((x.shape, x.stride()) for x in tensors)


@lru_cache(maxsize=4096)
def _shapes(
    spec: KernelSpec, matrices: tuple[Layout, ...], captured: tuple[Layout, ...], topk: int, sizes: tuple[int, ...]
) -> bytes:
    """The part of the argument structure that shapes decide; `matrices`: q, k, v and for a backward grad_out.  Packed
    and checked once, as a model calls its sites with the same shapes again and again."""
    (batch, heads, queries, _), (_, kv_heads, keys, _) = matrices[0][0], matrices[1][0]
    if keys > MOST_KEYS:
        raise MemoryError(f"{keys} keys: a row of so many scores fits in no memory")
    check_captured(spec, [shape for shape, _ in captured], {"b": batch, "h": heads, "i": queries, "j": keys})
    values = {"B": batch, "Hq": heads, "Hk": kv_heads, "Nq": queries, "Nk": keys, "topk": min(topk, keys)}
    if len(matrices) == len(MATRICES):
        values |= backward_plan(spec, matrices[0][0], matrices[1][0], tuple(prod(shape) for shape, _ in captured))
    for name, (_, strides) in zip(MATRICES, matrices, strict=False):
        values |= {f"{name}_stride{dim}": stride for dim, stride in enumerate(strides)}
    values |= {f"n{n}": int(size) for n, size in enumerate(sizes)}
    for n, (shape, strides) in enumerate(captured):
        values |= {f"c{n}_stride{dim}": stride for dim, stride in enumerate(strides)}
        values |= {f"c{n}_size{dim}": size for dim, size in enumerate(shape)}
    named = shape_fields(spec)
    return _struct(named).pack(*(values.get(name, 0) for _, name in named))


__all__ = ["Kernel", "backward", "backward_plan", "backward_runner", "forward", "kernel", "runner"]
