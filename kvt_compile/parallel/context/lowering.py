"""A call on a rank's part of a sequence -> the rank's rows of attention over the whole sequence.

A lowering like any other, so that it travels as an argument of the operator: a graph that was compiled inside
`context_parallel` says so in its code.  Outputs, kept keys (ties included) and gradients are those of one process; a
gradient of a captured tensor that every rank has is this rank's summand of it, as that of any parameter is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients, LoweringError
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.source import Source
from kvt_compile.parallel.context import gathering
from kvt_compile.parallel.context.captured import ContextParallelError, cut_of
from kvt_compile.parallel.context.counting import DIGIT, Counting
from kvt_compile.parallel.context.ring import Ring
from kvt_compile.parallel.context.whole import content_of_keys, content_of_places, counted_slots

Way = Literal["auto", "gather", "count"]


class ContextLowering:
    """`ring` and `way` as `context_parallel` was given them."""

    devices: tuple[str, ...] = ()

    def __init__(self, name: str, ring: Ring, way: Way) -> None:
        self.name, self.ring, self.way = name, ring, way
        self._agreed: set[tuple[object, ...]] = set()

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None if isinstance(spec, KernelSpec) else "the weights of a part of the keys are not those of all"

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        if lowerings.inside().lowering != self.name:
            raise ContextParallelError(
                "this attention was compiled inside of context_parallel and runs outside of it (or in another one), "
                "expected the same one: a model is compiled and run under one context"
            )
        self._agree(call)
        cut = cut_of(call)
        self._compare_places(call)
        if self.chosen_way(call) == "count":
            return Counting(call, self.ring, cut).forward()
        return gathering.forward(call, self.ring, cut)

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        cut = cut_of(call)
        if self.chosen_way(call) == "count":
            return Counting(call, self.ring, cut).backward(grad_out, logsumexp, threshold)
        return gathering.backward(call, self.ring, cut, grad_out, out, logsumexp, threshold)

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        raise LoweringError(f"{self.name}: {self.supports(SoftmaxSpec.of(scores.dtype, dtype))}")

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        raise LoweringError(f"{self.name}: {self.supports(SoftmaxSpec.of(input_dtype, weights.dtype))}")

    def source(self, spec: KernelSpec | SoftmaxSpec) -> Source | None:
        return lowerings.choose("auto", replace(spec), "cpu").source(spec)

    def chosen_way(self, call: AttentionCall) -> Literal["gather", "count"]:
        """The one that moves fewer bytes, by `gathered_bytes` and `counted_bytes`; a backward takes its forward's."""
        if self.way != "auto":
            return self.way
        return "count" if counted_bytes(call, self.ring.ranks) < gathered_bytes(call, self.ring.ranks) else "gather"

    def _agree(self, call: AttentionCall) -> None:
        """Once for each kind of call: the ranks have parts of one size, and of keys, and compute by the same lowering.

        Raises ContextParallelError on every rank, with what each of them has."""
        part = (*call.q.shape, *call.k.shape, call.v.shape[3], call.asked)
        kind = (call.spec, part)
        if kind in self._agreed:
            return
        names = [name for name in lowerings.names() if not name.startswith("context:")]
        local = replace(call.spec, needs_grad=())
        mine = names.index(lowerings.choose("auto", local, call.q.device.type).name)
        told = torch.tensor([*part, mine, content_of_keys(call)], device=call.q.device)
        every = [tuple(x.tolist()) for x in self.ring.each(told)]
        if len({x[:-2] for x in every}) > 1:
            raise ContextParallelError(
                "the ranks of context_parallel have parts of different sizes, expected the same on all: (q, k, Dv, "
                f"topk) are {', '.join(f'{x[:-2]} on rank {rank}' for rank, x in enumerate(every))}; pad the sequence"
            )
        if len({x[-2] for x in every}) > 1:
            raise ContextParallelError(
                "the ranks of context_parallel would compute attention by different lowerings, expected one: "
                f"{', '.join(f'{names[x[-2]]} on rank {rank}' for rank, x in enumerate(every))}. `kvt doctor` says on "
                "each machine what it lacks (a compiler, Triton)"
            )
        if every[0][-1] and len({x[-1] for x in every}) == 1:
            raise ContextParallelError(
                f"the {call.keys} keys of this attention are the same on all {self.ring.ranks} ranks of "
                "context_parallel, expected those of this rank's part of the sequence: each of them would be counted "
                f"{self.ring.ranks} times. Call attention to what every rank has whole (a text, say) outside of it"
            )
        self._agreed.add(kind)

    def _compare_places(self, call: AttentionCall) -> None:
        """In every call, as its captured tensors may be others.  Raises ContextParallelError."""
        if not (slots := counted_slots(call)):
            return
        told = torch.tensor([content_of_places(call, slot) for slot in slots], device=call.q.device)
        every = [x.tolist() for x in self.ring.each(told)]
        for slot, (first, *others) in zip(slots, zip(*every, strict=True), strict=True):
            if first and all(x == first for x in others):
                shape = tuple(call.captured[slot].shape)
                raise ContextParallelError(
                    f"captured tensor {slot}, of shape {shape}, rises or falls along the tokens and is the same on all "
                    f"{self.ring.ranks} ranks of context_parallel: places in a part, expected "
                    "those in the whole sequence (`Context.positions`; a causal mask is is_causal=True)"
                )


def gathered_bytes(call: AttentionCall, ranks: int) -> int:
    """What a rank receives in a forward of the gathering way: k and v of the others."""
    return (ranks - 1) * (call.k.numel() * call.k.element_size() + call.v.numel() * call.v.element_size())


def counted_bytes(call: AttentionCall, ranks: int) -> int:
    """What a rank receives in a forward of the counting way, at least: q of the others, its rows' sums from them, and
    counts, two maxima and a sum of every row, which rings of reductions send twice."""
    rows = call.q.numel() // max(call.q.shape[3], 1)
    wide = int(call.spec.accumulate.itemsize)
    q: int = call.q.numel() * call.q.element_size()
    sums: int = rows * call.v.shape[3] * max(wide, call.v.element_size())
    counts: int = 2 * rows * (4 * 2**DIGIT * (8 * wide // DIGIT) + 3 * wide)
    return (ranks - 1) * (q + sums + counts)
