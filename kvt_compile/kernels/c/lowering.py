"""The lowering "c": ops -> generated C kernels on a CPU, with the ATen lowering where none can be built."""

from __future__ import annotations

import dataclasses
import os
from functools import lru_cache

import torch
from torch import Tensor

from kvt_compile.kernels import tiles
from kvt_compile.kernels.c import launch, rows
from kvt_compile.kernels.c.generate import source
from kvt_compile.kernels.c.scalar import ELEMENTS
from kvt_compile.kernels.c.settings import Settings, from_environment
from kvt_compile.kernels.c.toolchain import BuildError, find_compiler
from kvt_compile.kernels.language.expressions import NotGenerated
from kvt_compile.kernels.language.limits import ScoreSyntaxError
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients, Lowering
from kvt_compile.kernels.op.ready import Runner
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec, SpecError
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.source import Source
from kvt_compile.kernels.warn import warn_once

LARGEST_HEAD = 2**14
"""Beyond it nothing of a tile stays in a cache, and sizes computed as int might not fit."""


class CLowering:
    """Generated C.  `settings` None: those of the environment at the first call."""

    name = "c"
    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, settings: Settings | None = None, fallback: Lowering = aten.LOWERING) -> None:
        self._settings = settings
        self.fallback = fallback

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            self._settings = from_environment()
        return self._settings

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        missing = _no_compiler(self.settings.compiler, self.settings.target, os.environ.get("PATH"))
        if missing is not None:
            warn_once(f"kvt_compile runs k-NN attention with ATen operators, several times slower: {missing}")
            return missing
        return refusal(spec if isinstance(spec, SoftmaxSpec) else dataclasses.replace(spec, needs_grad=()))

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        if not self.built(tiles.conditioned(call.spec)):
            return self.fallback.forward(call)
        return launch.forward(tiles.with_tables(call), self.settings)

    def runner(self, call: AttentionCall) -> Runner | None:
        return launch.runner(call, self.settings) if self.built(call.spec) else None

    def backward_runner(self, call: AttentionCall, grad_out: Tensor) -> Runner | None:
        return launch.backward_runner(call, self.settings, grad_out) if self.built(call.spec) else None

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        if not self.built(tiles.conditioned(call.spec)):
            return self.fallback.backward(call, grad_out, out, logsumexp, threshold)
        dq, dk, dv, dcaptured = launch.backward(tiles.with_tables(call), self.settings, grad_out, logsumexp, threshold)
        return dq, dk, dv, dcaptured[: len(call.captured)]

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        spec = SoftmaxSpec.of(scores.dtype, dtype)
        if not self.built(spec):
            return self.fallback.softmax(scores, dim, topk, dtype, tolerance)
        return rows.softmax(spec, self.settings, scores, dim, topk, dtype)

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        spec = SoftmaxSpec.of(input_dtype, weights.dtype)
        if grad.dtype != weights.dtype or not self.built(spec):
            return self.fallback.softmax_backward(grad, weights, dim, input_dtype)
        return rows.softmax_backward(spec, self.settings, grad, weights, dim, input_dtype)

    def source(self, spec: KernelSpec | SoftmaxSpec) -> Source:
        return Source("c", source(spec if isinstance(spec, SoftmaxSpec) else tiles.conditioned(spec)))

    def built(self, spec: KernelSpec | SoftmaxSpec) -> bool:
        """Whether the kernel is there; when it cannot be built, says so once and lets the fallback run."""
        try:
            launch.kernel(spec, self.settings)
        except (BuildError, OSError) as error:
            warn_once(
                "kvt_compile could not build a C kernel and runs k-NN attention with ATen operators, several times "
                f"slower, as long as this process lives: {error}\nkvt doctor says what this machine lacks.",
                about=("build", self.settings),
            )
            return False
        return True


@lru_cache(maxsize=64)
def _no_compiler(command: str | None, target: str, path: str | None) -> str | None:
    """None, or what is missing; looked up once for each value of PATH, not in every call."""
    try:
        find_compiler(command, target)
    except BuildError as error:
        return str(error)
    return None


@lru_cache(maxsize=4096)
def refusal(spec: KernelSpec | SoftmaxSpec) -> str | None:
    """None, or why no C can be generated for a spec."""
    if isinstance(spec, SoftmaxSpec):
        missing = [x for x in (spec.dtype, spec.out_dtype) if x not in rows.DTYPES]
        return f"softmax of {', '.join(missing)} is not generated" if missing else None
    if spec.select and (reason := tiles.refusal(spec.select)):
        return reason
    if spec.value_dtype == "float64" != spec.dtype:
        return f"float64 values with {spec.dtype} queries are not generated"
    if not (0 < spec.head_dim <= LARGEST_HEAD and 0 < spec.value_dim <= LARGEST_HEAD):
        return f"heads of {spec.head_dim} and {spec.value_dim} features are not generated, 1 to {LARGEST_HEAD} are"
    missing = [c.dtype for c in spec.captured if c.dtype not in ELEMENTS]
    if missing:
        return f"captured tensors of {', '.join(missing)} are not generated"
    try:
        source(tiles.conditioned(spec))
    except (NotGenerated, SpecError, ScoreSyntaxError) as error:
        return str(error)
    return None


LOWERING = CLowering()
