"""The gathering way: keys and values of all ranks travel to each, and each computes its rows as it would alone.

    forward    k, v of the whole sequence   ->  out, logsumexp, threshold of this rank's rows
    backward   the same again               ->  dq of the rows; dk, dv of the whole sequence, summed over ranks

A rank's rows are one or two runs of the sequence: a call of the machine's own lowering for each, that is told where the
run begins (`coordinates.of_shard`, `draw`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from kvt_compile.kernels.dropout import place_of_draws
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.parallel import coordinates
from kvt_compile.parallel.context.captured import Cut
from kvt_compile.parallel.context.order import Part
from kvt_compile.parallel.context.ring import Ring


def _whole(call: AttentionCall, ring: Ring, cut: Cut) -> AttentionCall:
    """The call with all keys."""
    k, v = ring.gather(call.k, 2), ring.gather(call.v, 2)
    captured = [ring.gather(x, cut.keys[n]) if n in cut.keys else x for n, x in enumerate(call.captured)]
    return dataclasses.replace(call, k=k, v=v, captured=captured, topk=min(call.asked, k.shape[2]))


def _runs(call: AttentionCall, ring: Ring, cut: Cut) -> Iterator[tuple[Part, AttentionCall]]:
    """The calls of this rank's runs of rows."""
    rows = call.q.shape[2]
    for part in ring.parts(rows):
        (score, weight), sizes = coordinates.of_shard(
            (call.spec.score, call.spec.weight), {"i": part.first}, cut.local("i"), call.sizes
        )
        captured = [narrowed(x, cut.rows.get(n), part) for n, x in enumerate(call.captured)]
        spec = dataclasses.replace(call.spec, score=score, weight=weight, sizes=len(sizes))
        first, *per = place_of_draws((*call.q.shape[:2], rows * ring.ranks), call.keys, call.part)
        draw = (first + part.first * per[2], *per)
        yield (
            part,
            dataclasses.replace(
                call, spec=spec, q=narrowed(call.q, 2, part), captured=captured, sizes=sizes, part=draw
            ),
        )


def narrowed(x: Tensor, dim: int | None, part: Part) -> Tensor:
    """A part of a tensor's dimension; the tensor itself where it has none."""
    return x if dim is None else x.narrow(dim, part.local, part.count)


def forward(call: AttentionCall, ring: Ring, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logsumexp, threshold) of this rank's rows."""
    results = []
    for _, run in _runs(_whole(call, ring, cut), ring, cut):
        results.append(lowerings.choose("auto", run.spec, run.q.device.type).forward(run))
    out, logsumexp, threshold = (torch.cat(x, 2) for x in zip(*results, strict=True))
    return out, logsumexp, threshold


def backward(
    call: AttentionCall, ring: Ring, cut: Cut, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
) -> Gradients:
    """(dq, dk, dv, dcaptured) of what this rank has; sums over ranks are wide."""
    whole, wide = _whole(call, ring, cut), call.spec.accumulate
    inputs = (whole.q, whole.k, whole.v, *whole.captured)
    sums = [
        torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, wide), device=x.device) if need else None
        for x, need in zip(inputs, call.spec.needs_grad, strict=True)
    ]
    for part, run in _runs(whole, ring, cut):
        lowering = lowerings.choose("auto", run.spec, run.q.device.type)
        dq, dk, dv, captured = lowering.backward(
            run, *(narrowed(x, 2, part) for x in (grad_out, out, logsumexp, threshold))
        )
        for n, (total, gradient) in enumerate(zip(sums, (dq, dk, dv, *captured), strict=True)):
            if total is not None and gradient is not None:
                dim = 2 if n == 0 else cut.rows.get(n - 3)
                narrowed(total, dim, part).add_(gradient)
    dims = {1: 2, 2: 2} | {slot + 3: dim for slot, dim in cut.keys.items()}
    full = [
        None if x is None else (ring.scatter_sum(x, dims[n]) if n in dims else x).to(inputs[n].dtype).contiguous()
        for n, x in enumerate(sums)
    ]
    return full[0], full[1], full[2], full[3:]
