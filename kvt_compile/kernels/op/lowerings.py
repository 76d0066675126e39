"""Lowering name -> lowering; "auto" -> the best one that supports the spec on this device.

A lowering is an object with the six methods of `Lowering`.  It is imported when first asked for, so that a machine
without a compiler or without Triton pays nothing for them.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvt_compile.kernels.op import agreement, ready
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.source import Source

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]


class LoweringError(ValueError):
    """No such lowering, or one that was asked for by name and cannot run the node."""


class CannotTraceError(Exception):
    """Why an operator stays in a graph that is compiled ahead of time, as a clause."""


class Lowering(Protocol):
    """What runs a node.  Shapes, dtypes and meaning are those of the ops (ops.py); inputs are already checked
    and autocast is off, strides may be anything, 0 included."""

    name: str
    devices: tuple[str, ...]
    """Device types it runs on, e.g. ("cpu",); empty = all."""

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        """None, or the reason why this lowering cannot run such a node, as a clause: "float64 is not generated"."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """(out, logsumexp, threshold), all contiguous."""

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        """(dq, dk, dv, [dcaptured]), contiguous, in their tensors' dtypes; None where `call.spec.needs_grad` is False.

        `out`, `logsumexp` and `threshold` are what `forward` returned for this call, with any strides."""

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        """Weights of the kept keys along `dim` (0 <= dim < max(scores.dim(), 1)), contiguous, in `dtype`.

        `tolerance` as in `AttentionCall`."""

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        """w * (g - sum(w * g)) along `dim`, contiguous, in `input_dtype`."""

    def source(self, spec: KernelSpec | SoftmaxSpec) -> Source | None:
        """The code generated for such a node; None from a lowering that generates none."""


_PLACES: dict[str, str | Lowering] = {
    # in the order "auto" tries them; "reference" is dense and only ever runs when named
    "triton": "kvt_compile.kernels.triton.lowering:LOWERING",
    "c": "kvt_compile.kernels.c.lowering:LOWERING",
    "aten": "kvt_compile.kernels.plain.aten:LOWERING",
    "reference": "kvt_compile.kernels.plain.reference_lowering:LOWERING",
}


def register(name: str, lowering: Lowering | str) -> Callable[[], None]:
    """Add or replace a lowering (an object, or "module:attribute" to import when needed).  Returns the undo."""
    before = _PLACES.get(name)
    _PLACES[name] = lowering
    choose.cache_clear()
    ready.forget()

    def undo() -> None:
        if before is None:
            _PLACES.pop(name, None)
        else:
            _PLACES[name] = before  # in its place: others may have come since
        choose.cache_clear()
        ready.forget()

    return undo


class Inside(NamedTuple):
    """What every attention of the process has to know now."""

    lowering: str = "auto"
    """What it asks for."""
    ranks: int = 1
    """Over how many ranks its keys are cut."""


_OUTSIDE = Inside()
_inside: list[Inside] = []
"""Innermost last.  A plain list: Dynamo guards on what it read of it."""
_began: list[int] = []
_ended: deque[range] = deque(maxlen=256)
"""The numbers that autograd gave to what ran between `enter` and `leave`, of the last times."""


def enter(inside: Inside) -> None:
    """From here on attention is over keys that several ranks share (`kvt_compile.parallel.context_parallel`)."""
    _began.append(_autograd_number())
    _inside.append(inside)


def leave() -> None:
    """The end of what `enter` began."""
    _inside.pop()
    _ended.append(range(_began.pop(), _autograd_number()))


def _autograd_number() -> int:
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def _is_recomputed() -> bool:
    """Whether a backward computes anew, as activation checkpointing does, what ran between `enter` and `leave`."""
    node = torch._C._current_autograd_node()
    return node is not None and any(node._sequence_nr() in numbers for numbers in _ended)


def inside() -> Inside:
    """What holds now."""
    return _inside[-1] if _inside else _OUTSIDE


def check_inside(name: str) -> None:
    """Raises LoweringError where attention asks for another lowering than the one it is inside of, is computed anew
    outside of the one it was inside of, or is inside of a region in which torch has replaced
    `scaled_dot_product_attention`, and it alone, by one over all ranks."""
    if not _inside:
        if _ended and _is_recomputed():
            raise LoweringError(
                "this attention ran inside of context_parallel and its activations are recomputed outside: it would "
                "attend to this rank's own keys only. With activation checkpointing call backward inside as well"
            )
        replaced = getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", None) or ""
        if replaced.startswith("torch.distributed"):
            raise LoweringError(
                "k-NN attention inside of torch.distributed.tensor.experimental.context_parallel would attend to this "
                "rank's own keys only: what torch replaces there is scaled_dot_product_attention alone. Use "
                "kvt_compile.parallel.context_parallel"
            )
    elif name != _inside[-1].lowering:
        raise LoweringError(
            f"this attention asks for the lowering {name!r} inside of {_inside[-1].lowering!r}: it would attend to "
            "this rank's own keys only. Compile and call the model inside of context_parallel, and what is not cut "
            "along the sequence outside of it"
        )


def names() -> tuple[str, ...]:
    """Every name the `lowering` argument of an op takes."""
    return ("auto", *_PLACES)


def get(name: str) -> Lowering:
    """The lowering of that name.  Raises LoweringError with the list of names and the nearest one."""
    if name not in _PLACES:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LoweringError(f"unknown lowering {name!r}, expected one of {', '.join(map(repr, names()))}{hint}")
    place = _PLACES[name]
    if isinstance(place, str):
        module, _, attribute = place.partition(":")
        place = _PLACES[name] = getattr(import_module(module), attribute)
    return place


@lru_cache(maxsize=4096)
def choose(name: str, spec: KernelSpec | SoftmaxSpec, device: str) -> Lowering:
    """The lowering that will run `spec` on `device` (a device type such as "cpu").

    Raises LoweringError when `name` is unknown, or is explicit and cannot run this node.
    """
    if name != "auto":
        lowering = get(name)
        reason = refusal(lowering, spec, device)
        if reason is not None:
            raise LoweringError(f'lowering {name!r} cannot run this node: {reason}; use lowering="auto" or "aten"')
        return lowering
    for candidate in _PLACES:
        if candidate != "reference" and refusal(get(candidate), spec, device) is None:
            agreement.note(spec, device, candidate)
            return get(candidate)
    raise LoweringError(f"no lowering runs this node on {device}: {spec}")


def refusal(lowering: Lowering, spec: KernelSpec | SoftmaxSpec, device: str) -> str | None:
    """Why `lowering` cannot run `spec` on `device`; None when it can."""
    if lowering.devices and device not in lowering.devices:
        return f"it runs on {', '.join(lowering.devices)}, not on {device}"
    return lowering.supports(spec)
