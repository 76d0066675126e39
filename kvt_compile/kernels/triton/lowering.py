"""The lowering "triton": generated Triton kernels on a GPU, and the ATen lowering, with a warning that says so once,
where Triton is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvt_compile.kernels import tiles
from kvt_compile.kernels.language.limits import ScoreSyntaxError
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients, Lowering
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec, SpecError
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.source import Source
from kvt_compile.kernels.triton import rows
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.launch import LARGEST, MOST_PROGRAMS, Launcher
from kvt_compile.kernels.triton.scalar import ELEMENTS, NotGenerated
from kvt_compile.kernels.warn import warn_once

LARGEST_HEAD = 256
FLOATS = ("float16", "bfloat16", "float32", "float64")


class TritonLowering:
    """Generated Triton.  `launcher`, `context` and `devices` are changed together to run in Triton's interpreter."""

    name = "triton"

    def __init__(
        self,
        launcher: Launcher | None = None,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        devices: tuple[str, ...] = ("cuda",),
        fallback: Lowering = aten.LOWERING,
    ) -> None:
        self.launcher = launcher or Launcher()
        self.context = context
        self.devices = devices
        self.fallback = fallback

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        if not has_triton():
            warn_once(
                "kvt_compile runs k-NN attention with ATen operators, several times slower: Triton is not installed; "
                "install it (pip install triton)"
            )
            return "Triton is not installed"
        return refusal(spec if isinstance(spec, SoftmaxSpec) else dataclasses.replace(spec, needs_grad=()))

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        if too_large(call):
            return self.fallback.forward(call)
        with self.context():
            return self.launcher.forward(tiles.with_tables(call))

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        if too_large(call):
            return self.fallback.backward(call, grad_out, out, logsumexp, threshold)
        wanted = call.spec.needs_grad
        # atomic sums come in any order; ATen's tiles and index_put do not
        apart = any(wanted[3:]) and torch.are_deterministic_algorithms_enabled()
        ours = _needing(call, (*wanted[:3], *(False for _ in wanted[3:]))) if apart else call
        with self.context():
            found = self.launcher.backward(tiles.with_tables(ours), grad_out, out, logsumexp, threshold)
        dq, dk, dv, dcaptured = found[0], found[1], found[2], found[3][: len(call.captured)]
        if apart:
            theirs = _needing(call, (False, False, False, *wanted[3:]))
            *_, dcaptured = self.fallback.backward(theirs, grad_out, out, logsumexp, threshold)
        return dq, dk, dv, dcaptured

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        if scores.dim() and (scores.shape[dim] > LARGEST or scores.numel() > MOST_PROGRAMS * scores.shape[dim]):
            return self.fallback.softmax(scores, dim, topk, dtype, tolerance)
        with self.context():
            return rows.softmax(self.launcher, SoftmaxSpec.of(scores.dtype, dtype), scores, dim, topk, dtype, tolerance)

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        if weights.dim() and weights.numel() > MOST_PROGRAMS * weights.shape[dim]:
            return self.fallback.softmax_backward(grad, weights, dim, input_dtype)
        spec = SoftmaxSpec.of(input_dtype, weights.dtype)
        with self.context():
            return rows.softmax_backward(self.launcher, spec, grad, weights, dim, input_dtype)

    def source(self, spec: KernelSpec | SoftmaxSpec) -> Source:
        return Source("python", module_source(spec if isinstance(spec, SoftmaxSpec) else tiles.conditioned(spec)))


def too_large(call: AttentionCall) -> bool:
    """Whether a size is beyond what a kernel counts exactly, or there might be more programs than a launch can have."""
    programs = max(call.rows.numel(), call.k.shape[:3].numel())
    return programs > MOST_PROGRAMS or any(size > LARGEST for size in (*call.rows, call.keys))


def _needing(call: AttentionCall, needs_grad: tuple[bool, ...]) -> AttentionCall:
    return dataclasses.replace(call, spec=dataclasses.replace(call.spec, needs_grad=needs_grad))


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed; it is imported when a kernel first runs."""
    return find_spec("triton") is not None


@lru_cache(maxsize=4096)
def refusal(spec: KernelSpec | SoftmaxSpec) -> str | None:
    """None, or why no Triton can be generated for a spec."""
    if isinstance(spec, SoftmaxSpec):
        missing = [x for x in (spec.dtype, spec.out_dtype) if x not in FLOATS]
        return f"softmax of {', '.join(missing)} is not generated" if missing else None
    if spec.select and (reason := tiles.refusal(spec.select)):
        return reason
    if spec.value_dtype == "float64" != spec.dtype:
        return f"float64 values with {spec.dtype} queries are not generated"
    if not 1 <= spec.head_dim <= LARGEST_HEAD or not 1 <= spec.value_dim <= LARGEST_HEAD:
        return f"heads of {spec.head_dim} and {spec.value_dim} features are not generated, 1 to {LARGEST_HEAD} are"
    missing = [c.dtype for c in spec.captured if c.dtype not in ELEMENTS]
    if missing:
        return f"captured tensors of {', '.join(missing)} are not generated"
    try:
        module_source(tiles.conditioned(spec))
    except (NotGenerated, SpecError, ScoreSyntaxError) as error:
        return str(error)
    return None


LOWERING = TritonLowering()
