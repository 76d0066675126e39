"""A call like one that was checked before -> what runs it at once.

    shapes, strides, dtypes, texts and numbers of a call  --runner-->  (q, k, v, captured) -> out, logsumexp, threshold
    the same of its backward                              --runner-->  (grad_out, q, ...) -> dq, dk, dv, dcaptured

A model calls its sites with the same layouts again and again; checking one, describing it and choosing its lowering
takes thirty microseconds of Python, more than a small attention itself.  All of that depends on what stands in the key
alone.  Only plain calls have one: tensors with strides on a CPU, no dropout, no selection but the best.

Where no gradient is asked for, such a call is found before autograd's kernel is run (`before_autograd`), which saves a
second way through the dispatcher: 12 microseconds.  `kvt_compile.functional` looks before it calls the operator at all
(`at_once`), which saves the first one too: 8 more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kvt_compile.kernels.op.arguments import AttentionArguments, BackwardArguments
from kvt_compile.kernels.op.call import AttentionCall

Runner = Callable[..., Any]
"""Takes the tensors that an operator's arguments begin with, and returns what it does."""
MOST = 1024
"""Calls that are remembered; then all are forgotten, and the next ones remembered anew."""
_runners: dict[Hashable, Runner] = {}


def key(a: AttentionArguments) -> Hashable:
    """What the checks and the kernel of a call depend on; None where that is more than is looked at here."""
    q, k, v, strided = a.q, a.k, a.v, torch.strided
    if not (q.is_cpu and k.is_cpu and v.is_cpu and q.layout is k.layout is v.layout is strided):
        return None
    return _key(
        q, k, v, a.captured, a.score, a.weight, a.topk, a.sizes,
        a.dropout_p, a.seed, a.lowering, a.tolerance, a.draw, a.select, a.grid, a.prefix,
    )  # fmt: skip


def _key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor] | None,
    score: str,
    weight: str,
    topk: int,
    sizes: Sequence[int] | None,
    dropout_p: float,
    seed: Tensor | None,
    lowering: str,
    tolerance: float = 0.0,
    draw: Sequence[int] | None = None,
    select: str = "",
    grid: Sequence[int] | None = None,
    prefix: int = 0,
) -> Hashable:
    """`key` of the operator's arguments in their order; q, k and v are known to be strided tensors of a CPU."""
    if seed is not None or draw is not None or dropout_p or select:
        return None
    layouts: tuple[Hashable, ...] = ()
    for x in captured or ():
        if not x.is_cpu or x.layout is not torch.strided or x.is_neg():
            return None
        layouts += (x.shape, x.stride(), x.dtype)
    return (
        score, weight, topk, tuple(sizes) if sizes else (), lowering, tolerance, layouts,
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
    )  # fmt: skip


def backward_key(a: BackwardArguments) -> Hashable:
    """`key` of a backward."""
    forward = key(a)
    if forward is None:
        return None
    for x in (a.grad_out, a.out, a.logsumexp, a.threshold):
        if not x.is_cpu or x.layout is not torch.strided or x.is_neg():
            return None
    if not (a.logsumexp.is_contiguous() and a.threshold.is_contiguous()):  # vmap saves them with a stride of 0
        return None
    saved = tuple((x.shape, x.dtype) for x in (a.grad_out, a.out, a.logsumexp, a.threshold))
    return "backward", forward, saved, a.grad_out.stride(), tuple(a.needs_grad)


def runner(key: Hashable) -> Runner | None:
    """What ran such a call before; None where nothing did, or where `key` is None."""
    return _runners.get(key)


def remember(key: Hashable, lowering: object, call: AttentionCall, grad_out: Tensor | None = None) -> None:
    """What ran a call runs every one of that key from now on, where its lowering knows a short way: a lowering may have
    `runner(call)` and `backward_runner(call, grad_out)`, both `-> Runner | None`, asked for a call that just ran."""
    short = None if key is None else getattr(lowering, "runner" if grad_out is None else "backward_runner", None)
    if short is None or (run := short(call) if grad_out is None else short(call, grad_out)) is None:
        return
    if len(_runners) >= MOST:
        _runners.clear()
    _runners[key] = run


def before_autograd(check: Callable[[str], None], general: Callable[..., Any]) -> Callable[..., Any]:
    """`general`, autograd's kernel of `kvt::attention`, with the short way before it.

    The set of dispatch keys says that nothing else has to see the call: q, k and v are plain tensors of a CPU, no
    subclass, no mode, no transform.  `check` is given the lowering, as in every call.
    """

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if keys == _PLAIN and not kwargs and forward_ad._current_level < 0:
            q, k, v, captured = args[:4]
            if not torch.is_grad_enabled() or not any_requires_grad(q, k, v, captured):
                check(args[_LOWERING])
                if (run := _runners.get(_key(*args))) is not None:
                    return run(q, k, v, captured or ())
        return general(keys, *args, **kwargs)

    return kernel


def at_once(
    check: Callable[[str], None], q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the operator would answer, without torch's dispatcher, or None: where the call was not checked before, or
    something else has to see it, as a mode, a transform, a subclass, autograd or the profiler.

    `rest`: the operator's arguments behind the captured tensors, in their order.
    """
    here = torch._C
    included = here._dispatch_tls_local_include_set()
    if included != _USUAL and included != _IN_INFERENCE_MODE:
        return None
    for x in (q, k, v, *captured):
        if type(x) not in _TYPES or ((keys := here._dispatch_keys(x)) != _OF_TENSOR and keys != _OF_INFERENCE_TENSOR):
            return None
    if here._is_torch_function_mode_enabled() or here._autograd._profiler_enabled() or forward_ad._current_level >= 0:
        return None
    if torch.is_grad_enabled() and any_requires_grad(q, k, v, captured):
        return None
    check(rest[_LOWERING - 4])
    run = _runners.get(_key(q, k, v, captured, *rest))
    return None if run is None else run(q, k, v, captured)


_LOWERING = [x.name for x in fields(AttentionArguments)].index("lowering")


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    return keys if len(names) == 1 else keys | _keys(*names[1:])


_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN = _keys("CPU", "AutogradCPU")
_OF_TENSOR = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
_OF_INFERENCE_TENSOR = _keys("CPU", "AutocastCPU")
_USUAL, _IN_INFERENCE_MODE = _keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")
"""What a thread adds to the keys of its tensors where no mode and no transform is on."""


def any_requires_grad(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor] | None) -> bool:
    """Whether autograd has to see a call."""
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return bool(captured) and any(x.requires_grad for x in captured or ())


forget = _runners.clear
"""Lowerings have changed."""
