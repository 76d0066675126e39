"""Tensors -> tensors: fills the kernels' parameters and launches them.

Outputs are allocated here; nothing is copied but a number in a 0-d CPU tensor.  A launch reads no value back from the
device, so that it can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.expressions import check_captured, surely
from kvt_compile.kernels import tune
from kvt_compile.kernels.dropout import keep_scale
from kvt_compile.kernels.lowerings import Gradients
from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton import layout
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Call, choose
from kvt_compile.kernels.triton.module import module
from kvt_compile.kernels.triton.scalar import index_needs_64_bits
from kvt_compile.kernels.triton.targets import precision
from kvt_compile.topk import kept_range

Arguments = dict[str, Any]
Chooser = Callable[[Call], Blocks]
LARGEST = 2**24
"""A count of keys is a float32, exact to here; integers of an expression are bounded by it."""


class Launcher:
    """Launches the kernels of any spec; `interpreted`: on CPU tensors, within `interpret.interpreted()`."""

    def __init__(self, interpreted: bool = False, chooser: Chooser = choose) -> None:
        self.interpreted = interpreted
        self.chooser = chooser

    def forward(
        self,
        spec: KernelSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        topk: int,
        sizes: Sequence[int],
        dropout_p: float,
        seed: Tensor | None,
        tolerance: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, logsumexp, threshold) as `Lowering.forward`."""
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=v.dtype)
        logsumexp, threshold = (q.new_empty(q.shape[:3], dtype=spec.accumulate) for _ in range(2))
        if k.shape[2] == 0:
            return out.zero_(), logsumexp.fill_(-torch.inf), threshold.fill_(-torch.inf)
        if logsumexp.numel():
            captured = on_device(captured, q.device)
            arguments = _arguments(spec, q, k, v, captured, sizes, dropout_p, seed)
            arguments |= {"out_ptr": out, "logsumexp_ptr": logsumexp, "threshold_ptr": threshold}
            arguments |= kept(topk, tolerance)
            index = _index(spec, (q, k, v, out, *captured), sizes)
            self.run(spec, "forward", layout.forward_names(spec), arguments, q, k, topk, index)
        return out, logsumexp, threshold

    def backward(
        self,
        spec: KernelSpec,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        out: Tensor,
        logsumexp: Tensor,
        threshold: Tensor,
        topk: int,
        sizes: Sequence[int],
        dropout_p: float,
        seed: Tensor | None,
    ) -> Gradients:
        """(dq, dk, dv, dcaptured) as `Lowering.backward`; sums into captured tensors are atomic, all others ordered."""
        inputs = (q, k, v, *captured)
        dq, dk, dv = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
            for x, need in zip(inputs[:3], spec.needs_grad[:3], strict=True)
        )
        # on the device of the tensors, even for a number on the CPU
        sums = [
            torch.zeros(c.shape, dtype=spec.accumulate, device=q.device) if need else None
            for c, need in zip(captured, spec.needs_grad[3:], strict=True)
        ]
        if 0 in (*q.shape[:3], k.shape[2]):
            for x in (dq, dk, dv):
                if x is not None:
                    x.zero_()
        else:
            moved = on_device(captured, q.device)
            arguments = _arguments(spec, q, k, v, moved, sizes, dropout_p, seed)
            arguments |= _matrix("grad_out", grad_out)
            arguments |= {"out_ptr": out.contiguous(), "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv}
            arguments |= {"logsumexp_ptr": logsumexp.contiguous(), "threshold_ptr": threshold.contiguous()}
            arguments |= {f"{x}_ptr": torch.empty_like(logsumexp) for x in ("delta", "scale")}
            arguments |= {f"dc{n}_ptr": x for n, x in enumerate(sums)}
            index = _index(spec, (q, k, v, out, grad_out, *moved), sizes)
            names = layout.backward_names(spec)
            self.run(spec, "backward_rows", names, arguments, q, k, topk, index)
            if dq is not None or any(x is not None for x in sums):
                self.run(spec, "backward_q", names, arguments, q, k, topk, index)
            if dk is not None or dv is not None:
                self.run(spec, "backward_kv", names, arguments, q, k, topk, index)
        gradients = [None if x is None else x.to(c) for x, c in zip(sums, captured, strict=True)]
        return dq, dk, dv, gradients

    def run(
        self,
        spec: KernelSpec,
        part: str,
        names: Sequence[str],
        arguments: Arguments,
        q: Tensor,
        k: Tensor,
        topk: int,
        index: str,
    ) -> None:
        """Launch one kernel of a spec with the block sizes that are chosen for it."""
        batch, heads, queries, _ = q.shape
        kv_heads, keys = k.shape[1:3]
        kernel = self.kernel(spec, part)
        products = precision(spec)

        def launch(blocks: Blocks, arguments: Arguments) -> Any:
            if part == "backward_kv":
                programs = -(-keys // blocks.cols) * batch * kv_heads
            else:
                programs = -(-queries // blocks.rows) * batch * heads
            constants = constexprs(part, blocks, index, products)
            return self.launch(kernel, programs, [arguments[x] for x in names], constants, blocks)

        def trial(blocks: Blocks) -> Callable[[], None]:
            # every other output is written anew, but sums into captured tensors would grow
            sums = {name: torch.zeros_like(x) for name, x in arguments.items() if name[:2] == "dc" and x is not None}
            compiled = launch(blocks, arguments | sums)
            if compiled is not None and compiled.n_spills:
                raise tune.Unfit(f"spills {compiled.n_spills} registers")
            return lambda: launch(blocks, arguments | sums)

        with self.on(q):
            call = Call(spec, part, queries, keys, batch * heads, topk, q.device, trial)
            launch(self.chooser(call), arguments)

    def kernel(self, spec: KernelSpec | SoftmaxSpec, part: str) -> Any:
        """A kernel that `launch` takes."""
        return getattr(module(spec, self.interpreted), part)

    def launch(
        self, kernel: Any, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any], blocks: Blocks
    ) -> Any:
        """One launch; what Triton compiled for it."""
        return kernel[(programs,)](*arguments, **constants, **options(blocks))

    def on(self, x: Tensor) -> AbstractContextManager[Any]:
        """Launches go to the current device, which need not be that of the tensors."""
        return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def constexprs(part: str, blocks: Blocks, index: str, products: str | None) -> dict[str, Any]:
    """The compile-time arguments of a kernel.  index: "int32" or "int64"; products: see `targets.precision`."""
    import triton.language as tl

    values: dict[str, Any] = {"ROWS": blocks.rows, "COLS": blocks.cols, "STAGES": blocks.stages}
    values["INDEX"] = getattr(tl, index)
    if products is not None:
        values["PRECISION"] = products
    if part in ("forward", "softmax"):
        values["RESIDENT"] = blocks.kind == "resident"
    return values


def options(blocks: Blocks) -> dict[str, Any]:
    """How a kernel is compiled.  Nothing is contracted into a multiply-add: two kernels that contract the same expression
    in two ways would disagree about the last bit of a score, and so about a key."""
    return {"num_warps": blocks.warps, "enable_fp_fusion": False}


def kept(topk: int, tolerance: float) -> Arguments:
    """How many keys a row keeps: what is aimed at, and what is good enough."""
    fewest, most = kept_range(topk, tolerance)
    return {"topk": topk, "fewest": fewest, "most": most}


def on_device(captured: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """A number in a 0-d CPU tensor may join tensors of any device; filling reads it without a copy from the host."""
    return [c if c.device == device else torch.full((), c.item(), dtype=c.dtype, device=device) for c in captured]


def _matrix(name: str, x: Tensor) -> Arguments:
    return {f"{name}_ptr": x} | {f"{name}_stride{dim}": stride for dim, stride in enumerate(x.stride())}


def _arguments(
    spec: KernelSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    sizes: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> Arguments:
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    check_captured(spec, [c.shape for c in captured], {"b": batch, "h": heads, "i": queries, "j": keys})
    arguments = _matrix("q", q) | _matrix("k", k) | _matrix("v", v)
    arguments |= {"heads": heads, "group": heads // kv_heads, "nq": queries, "nk": keys}
    arguments |= {"seed_ptr": seed, "drop_below": int(dropout_p * 2**32), "keep_scale": keep_scale(dropout_p)}
    arguments |= {f"n{n}": size for n, size in enumerate(sizes)}
    for n, c in enumerate(captured):
        arguments[f"c{n}_ptr"] = c
        arguments |= {f"c{n}_stride{dim}": stride for dim, stride in enumerate(c.stride())}
        arguments |= {f"c{n}_size{dim}": size for dim, size in enumerate(c.shape)}
    return arguments


def _index(spec: KernelSpec, tensors: Sequence[Tensor], sizes: Sequence[int]) -> str:
    """The type of coordinates and offsets."""
    if _needs_64_bits(spec) or not all(surely(n < LARGEST) for n in sizes):
        return "int64"
    # rows beyond the last are masked, not skipped: their offsets must be numbers too
    reaches = [
        sum((n + 1024) * stride for n, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)) for x in tensors[:3]
    ]
    reaches += [sum(n * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
    return "int32" if all(surely(reach < 2**31) for reach in reaches) else "int64"


@lru_cache(maxsize=4096)
def _needs_64_bits(spec: KernelSpec) -> bool:
    return index_needs_64_bits([spec.score_expression, spec.weight_expression])
