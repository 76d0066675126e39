"""A call like one that was checked before -> what runs it at once.

    shapes, strides, dtypes, texts and numbers of a call  --runner-->  (q, k, v, captured) -> out, logsumexp, threshold

A model calls its sites with the same layouts again and again; checking one, describing it and choosing its lowering
takes thirty microseconds of Python, more than a small attention itself.  All of that depends on what stands in the key
alone.  Only plain calls have one: tensors with strides on a CPU, no dropout, no selection but the best.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from kvt_compile.kernels.op.arguments import AttentionArguments
from kvt_compile.kernels.op.call import AttentionCall

Runner = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]]
MOST = 1024
"""Calls that are remembered; then all are forgotten, and the next ones remembered anew."""
_runners: dict[Hashable, Runner] = {}


def key(a: AttentionArguments) -> Hashable:
    """What the checks and the kernel of a call depend on; None where that is more than is looked at here."""
    if a.seed is not None or a.draw is not None or a.dropout_p or a.select:
        return None
    q, k, v, strided = a.q, a.k, a.v, torch.strided
    if not (q.is_cpu and k.is_cpu and v.is_cpu and q.layout is k.layout is v.layout is strided):
        return None
    captured: tuple[Hashable, ...] = ()
    for x in a.captured or ():
        if not x.is_cpu or x.layout is not strided or x.is_neg():
            return None
        captured += (x.shape, x.stride(), x.dtype)
    layouts = q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype, captured
    return (a.score, a.weight, a.topk, tuple(a.sizes or ()), a.lowering, a.tolerance, layouts)


def runner(key: Hashable) -> Runner | None:
    """What ran such a call before; None where nothing did, or where `key` is None."""
    return _runners.get(key)


def remember(key: Hashable, lowering: object, call: AttentionCall) -> None:
    """What ran a call runs every one of that key from now on, where its lowering knows a short way: a lowering may have
    `runner(call) -> Runner | None`, asked for a call that has just run."""
    short = None if key is None else getattr(lowering, "runner", None)
    if short is None or (run := short(call)) is None:
        return
    if len(_runners) >= MOST:
        _runners.clear()
    _runners[key] = run


forget = _runners.clear
"""Lowerings have changed."""
