"""Tensors -> tensors: fills the kernels' parameters and launches them.

Outputs are allocated here; nothing is copied but a number in a 0-d CPU tensor.  A launch reads no value back from the
device, so that it can be captured into a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels import tune
from kvt_compile.kernels.dropout import keep_scale
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.captured import check_captured, surely
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.tiles import Walks
from kvt_compile.kernels.triton import layout
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch, choose
from kvt_compile.kernels.triton.constants import constexprs, options
from kvt_compile.kernels.triton.jobs import Job, Sizes
from kvt_compile.kernels.triton.listed import listed, walks
from kvt_compile.kernels.triton.module import module
from kvt_compile.kernels.triton.scalar import index_needs_64_bits
from kvt_compile.kernels.triton.targets import precision
from kvt_compile.topk import kept_range

Arguments = dict[str, Any]
Chooser = Callable[[Launch], Blocks]
LARGEST = 2**24
"""A count of keys is a float32, exact to here; integers of an expression are bounded by it."""
MOST_PROGRAMS = 2**31 - 1
"""Of a launch (CUDA programming guide, technical specifications per compute capability: the x-dimension of a grid)."""


class Launcher:
    """Launches the kernels of any spec; `interpreted`: on CPU tensors, within `interpret.interpreted()`."""

    def __init__(self, interpreted: bool = False, chooser: Chooser = choose) -> None:
        self.interpreted = interpreted
        self.chooser = chooser

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """(out, logsumexp, threshold) as `Lowering.forward`."""
        out = call.q.new_empty((*call.rows, call.v.shape[3]), dtype=call.v.dtype)
        logsumexp, threshold = (call.q.new_empty(call.rows, dtype=call.spec.accumulate) for _ in range(2))
        if call.keys == 0:
            return out.zero_(), logsumexp.fill_(-torch.inf), threshold.fill_(-torch.inf)
        if logsumexp.numel():
            call = on_device(call)
            arguments = _arguments(call)
            arguments |= {"out_ptr": out, "logsumexp_ptr": logsumexp, "threshold_ptr": threshold}
            arguments |= kept(call.topk, call.tolerance)
            names, index = layout.forward_names(call.spec), _index(call, out)
            self.run(call, "forward", names, arguments, index, walks(call))
        return out, logsumexp, threshold

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        """(dq, dk, dv, dcaptured) as `Lowering.backward`; sums into captured tensors are atomic, all others ordered."""
        spec, device = call.spec, call.q.device
        dq, dk, dv = (
            torch.empty(x.shape, dtype=x.dtype, device=device) if need else None
            for x, need in zip((call.q, call.k, call.v), spec.needs_grad[:3], strict=True)
        )
        # on the device of the tensors, even for a number on the CPU
        sums = [
            torch.zeros(c.shape, dtype=spec.accumulate, device=device) if need else None
            for c, need in zip(call.captured, spec.needs_grad[3:], strict=True)
        ]
        if 0 in (*call.rows, call.keys):
            for x in (dq, dk, dv):
                if x is not None:
                    x.zero_()
        else:
            moved = on_device(call)
            arguments = _arguments(moved) | _matrix("grad_out", grad_out)
            arguments |= {"out_ptr": out.contiguous(), "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv}
            arguments |= {"logsumexp_ptr": logsumexp.contiguous(), "threshold_ptr": threshold.contiguous()}
            arguments |= {f"{x}_ptr": torch.empty_like(logsumexp) for x in ("delta", "scale")}
            arguments |= {f"dc{n}_ptr": x for n, x in enumerate(sums)}
            written = [x for x in (dq, dk, dv, *sums) if x is not None]
            names, index = layout.backward_names(spec), _index(moved, out, grad_out, *written)
            parts = ["backward_rows"]
            parts += ["backward_q"] if dq is not None or any(x is not None for x in sums) else []
            parts += ["backward_kv"] if dk is not None or dv is not None else []
            every = walks(moved)
            for part in parts:
                self.run(moved, part, names, arguments, index, every)
        gradients = [None if x is None else x.to(c) for x, c in zip(sums, call.captured, strict=True)]
        return dq, dk, dv, gradients

    def run(
        self,
        call: AttentionCall,
        part: str,
        names: Sequence[str],
        arguments: Arguments,
        index: str,
        every: Walks | None = None,
    ) -> None:
        """Launch one kernel of a spec with the block sizes that are chosen for it.  every: a selection's lists."""
        sizes = Sizes.of(call)
        kernel = self.kernel(call.spec, part)
        products = precision(call.spec)

        def launch(blocks: Blocks, arguments: Arguments) -> Any:
            found = None if every is None else listed(call, part, blocks, every)
            constants = constexprs(part, blocks, index, products, None if found is None else found.constants)
            arguments = arguments if found is None else arguments | found.arguments
            programs = sizes.programs(part, blocks) if found is None else found.programs
            return self.launch(kernel, programs, [arguments[x] for x in names], constants, blocks)

        def trial(blocks: Blocks) -> Callable[[], None]:
            # every other output is written anew, but sums into captured tensors would grow
            sums = {name: torch.zeros_like(x) for name, x in arguments.items() if name[:2] == "dc" and x is not None}
            compiled = launch(blocks, arguments | sums)
            if compiled is not None and compiled.n_spills:
                raise tune.Unfit(f"spills {compiled.n_spills} registers")
            return lambda: launch(blocks, arguments | sums)

        with self.on(call.q):
            which = Launch(
                call.spec, part, sizes.queries, sizes.keys, sizes.batch * sizes.heads, call.topk, call.q.device, trial,
                lambda: Job.of(call, part, names, arguments, index, products),
            )  # fmt: skip
            launch(self.chooser(which), arguments)

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


def kept(topk: int, tolerance: float) -> Arguments:
    """How many keys a row keeps: what is aimed at, and what is good enough."""
    fewest, most = kept_range(topk, tolerance)
    return {"topk": topk, "fewest": fewest, "most": most}


def on_device(call: AttentionCall) -> AttentionCall:
    """A number in a 0-d CPU tensor may join tensors of any device; filling reads it without a copy from the host."""
    device = call.q.device
    if all(c.device == device for c in call.captured):
        return call
    moved = [c if c.device == device else torch.full((), c.item(), dtype=c.dtype, device=device) for c in call.captured]
    return dataclasses.replace(call, captured=moved)


def _matrix(name: str, x: Tensor) -> Arguments:
    return {f"{name}_ptr": x} | {f"{name}_stride{dim}": stride for dim, stride in enumerate(x.stride())}


def _arguments(call: AttentionCall) -> Arguments:
    batch, heads, queries = call.rows
    kv_heads, keys = call.k.shape[1:3]
    check_captured(call.spec, [c.shape for c in call.captured], {"b": batch, "h": heads, "i": queries, "j": keys})
    arguments = _matrix("q", call.q) | _matrix("k", call.k) | _matrix("v", call.v)
    arguments |= {"heads": heads, "group": heads // kv_heads, "nq": queries, "nk": keys}
    arguments |= {"seed_ptr": call.seed, "drop_below": int(call.dropout_p * 2**32)}
    arguments |= {"keep_scale": keep_scale(call.dropout_p)} | dict(zip(layout.DRAW, call.draw, strict=True))
    arguments |= {f"n{n}": size for n, size in enumerate(call.sizes)}
    for n, c in enumerate(call.captured):
        arguments[f"c{n}_ptr"] = c
        arguments |= {f"c{n}_stride{dim}": stride for dim, stride in enumerate(c.stride())}
        arguments |= {f"c{n}_size{dim}": size for dim, size in enumerate(c.shape)}
    return arguments


def _index(call: AttentionCall, *more: Tensor) -> str:
    """The type of coordinates and offsets; `more`: what a kernel reads or writes besides the call's tensors."""
    if _needs_64_bits(call.spec) or not all(surely(n < LARGEST) for n in call.sizes):
        return "int64"
    matrices = (call.q, call.k, call.v)
    # rows beyond the last are masked, not skipped: their offsets must be numbers too
    reaches = [
        sum((n + 1024) * stride for n, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)) for x in matrices
    ]
    tensors = (*matrices, *call.captured, *more)
    reaches += [sum(n * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
    return "int32" if all(surely(reach < 2**31) for reach in reaches) else "int64"


@lru_cache(maxsize=4096)
def _needs_64_bits(spec: KernelSpec) -> bool:
    return index_needs_64_bits([spec.score_expression, spec.weight_expression])
