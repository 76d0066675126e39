"""Tensors -> tensors: packs the argument structure and calls the built kernel.

Outputs are allocated here; a kernel allocates only its threads' scratch memory, O(Nk) each.  Nothing is copied: strides
go to the kernel as they are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvt_compile.kernels.c import cache
from kvt_compile.kernels.c.generate import source
from kvt_compile.kernels.c.gradients import separated_axes
from kvt_compile.kernels.c.layout import MATRICES, fields
from kvt_compile.kernels.c.settings import Settings
from kvt_compile.kernels.dropout import keep_scale
from kvt_compile.kernels.expressions import check_captured
from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec

Arguments = dict[str, int | float]
Plan = dict[str, int]
TASKS = 12
"""A backward with fewer (batch, head) pairs also splits the queries, at the price of partial sums of dk and dv.  Shapes
alone decide, so that results do not depend on the number of threads."""


class Kernel:
    """The built library of one spec, ready to be called."""

    def __init__(self, spec: KernelSpec | SoftmaxSpec, settings: Settings) -> None:
        self.spec = spec
        self.library = cache.load(source(spec), settings)

    def call(self, name: str, names: Sequence[tuple[str, str]], arguments: Arguments) -> None:
        """Run an entry point.  Raises MemoryError when it finds no scratch memory."""
        layout = "=" + "".join("d" if ctype == "double" else "q" for ctype, _ in names)
        packed = struct.pack(layout, *(arguments.get(x, 0) for _, x in names))
        if self.library[name](ctypes.c_char_p(packed)):
            raise MemoryError("a k-NN attention kernel found no memory for its scratch space")


@lru_cache(maxsize=1024)
def kernel(spec: KernelSpec | SoftmaxSpec, settings: Settings) -> Kernel:
    """The kernel of a spec; forward and backward, whatever needs a gradient, are one library."""
    if isinstance(spec, KernelSpec) and spec.needs_grad:
        return kernel(dataclasses.replace(spec, needs_grad=()), settings)
    return Kernel(spec, settings)


def forward(
    spec: KernelSpec,
    settings: Settings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    topk: int,
    sizes: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logsumexp, threshold) as `Lowering.forward`."""
    out = q.new_empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype)
    logsumexp, threshold = (q.new_empty(q.shape[:3], dtype=spec.accumulate) for _ in range(2))
    if k.shape[2] == 0:
        return out.zero_(), logsumexp.fill_(-torch.inf), threshold.fill_(-torch.inf)
    if out.shape[0] and out.shape[1] and out.shape[2]:
        arguments = _arguments(spec, q, k, v, captured, topk, sizes, dropout_p, seed)
        arguments |= {"out": out.data_ptr(), "lse": logsumexp.data_ptr(), "threshold": threshold.data_ptr()}
        kernel(spec, settings).call("kvt_forward", fields(spec), arguments)
    return out, logsumexp, threshold


def backward(
    spec: KernelSpec,
    settings: Settings,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    logsumexp: Tensor,
    threshold: Tensor,
    topk: int,
    sizes: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """(dq, dk, dv, dcaptured) as `Lowering.backward`."""
    wanted = spec.needs_grad
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in zip((q, k, v), wanted, strict=False)
    )
    if 0 in (*q.shape[:3], k.shape[2]):
        for x in (dq, dk, dv):
            if x is not None:
                x.zero_()
        return dq, dk, dv, [torch.zeros_like(c) if n else None for c, n in zip(captured, wanted[3:], strict=True)]
    plan = backward_plan(spec, q.shape, k.shape, tuple(c.numel() for c in captured))
    sums: list[Tensor | None] = [
        torch.zeros((plan["tasks"] if plan["copies"] else 1, *c.shape), dtype=spec.accumulate) if n else None
        for c, n in zip(captured, wanted[3:], strict=True)
    ]
    arguments = _arguments(spec, q, k, v, captured, topk, sizes, dropout_p, seed)
    arguments |= plan
    arguments |= {"grad_out": grad_out.data_ptr(), "lse": logsumexp.data_ptr(), "threshold": threshold.data_ptr()}
    arguments |= {f"grad_out_stride{dim}": stride for dim, stride in enumerate(grad_out.stride())}
    arguments |= {name: x.data_ptr() for name, x in (("dq", dq), ("dk", dk), ("dv", dv)) if x is not None}
    arguments |= {f"dc{n}": x.data_ptr() for n, x in enumerate(sums) if x is not None}
    kernel(spec, settings).call("kvt_backward", fields(kernel(spec, settings).spec), arguments)
    dcaptured = [None if x is None else x.sum(0).to(c.dtype) for x, c in zip(sums, captured, strict=True)]
    return dq, dk, dv, dcaptured


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


def _arguments(
    spec: KernelSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    topk: int,
    sizes: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> Arguments:
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    check_captured(spec, captured, {"b": batch, "h": heads, "i": queries, "j": keys})
    arguments: Arguments = {
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "B": batch,
        "Hq": heads,
        "Hk": kv_heads,
        "Nq": queries,
        "Nk": keys,
        "topk": min(topk, keys),
        "threads": torch.get_num_threads(),
        "seed": int(seed.item()) if seed is not None else 0,
        "drop_below": int(dropout_p * 2**32),
        "keep_scale": keep_scale(dropout_p),
    }
    for name, x in zip(MATRICES, (q, k, v), strict=False):
        arguments |= {f"{name}_stride{dim}": stride for dim, stride in enumerate(x.stride())}
    arguments |= {f"n{n}": int(size) for n, size in enumerate(sizes)}
    for n, c in enumerate(captured):
        arguments[f"c{n}"] = c.data_ptr()
        arguments |= {f"c{n}_stride{dim}": stride for dim, stride in enumerate(c.stride())}
        arguments |= {f"c{n}_size{dim}": size for dim, size in enumerate(c.shape)}
    return arguments


__all__ = ["Kernel", "backward", "backward_plan", "forward", "kernel"]
