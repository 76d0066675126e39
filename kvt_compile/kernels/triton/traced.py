"""An operator in a graph that AOTInductor traces -> its Triton kernels there, as `torch.library.triton_op` does it.

    kvt::attention(q, k, v, ...)    ->  out, logsumexp, threshold = empty ...;  triton_kernel_wrapper(forward, q, ...)
    kvt::topk_softmax(scores, ...)  ->  out = empty ...;                        triton_kernel_wrapper(softmax, ...)

Inductor compiles a user's kernel with contraction of products and sums allowed and takes no option against it; so these
kernels come from sources in which nothing that a score is made of can be contracted
(`module_source(contracting=True)`), for NVIDIA GPUs.  No branch depends on a symbolic size: what holds for some sizes
only is not assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.op.arguments import AttentionArguments, SoftmaxArguments
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import CannotTraceError
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton import rows
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.choose import Launch, choose
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.lowering import has_triton, refusal
from kvt_compile.kernels.triton.module import module
from kvt_compile.kernels.triton.scalar import NotGenerated

SOME_SIZE = 1024
"""Stands for a symbolic number of queries or keys where block sizes are chosen: rows that no tile holds whole."""


class TracingLauncher(Launcher):
    """Launches become nodes of the graph that is being traced."""

    def __init__(self) -> None:
        super().__init__(chooser=known_blocks)

    def kernel(self, spec: KernelSpec | SoftmaxSpec, part: str) -> Any:
        return getattr(module(spec, contracting=True), part)

    def launch(
        self, kernel: Any, programs: int, arguments: Sequence[Any], constants: Mapping[str, Any], blocks: Blocks
    ) -> Any:
        torch.library.wrap_triton(kernel)[(programs,)](*arguments, **constants, num_warps=blocks.warps)

    def on(self, x: Tensor) -> AbstractContextManager[Any]:
        return nullcontext()


def known_blocks(launch: Launch) -> Blocks:
    """Measured block sizes where there are any and sizes are known, else the default; nothing is timed here."""
    sizes = (launch.queries, launch.keys, launch.heads, launch.topk)
    if all(isinstance(x, int) for x in sizes):
        return choose(launch, "cached" if torch.cuda.is_available() else "off")
    queries, keys = (x if isinstance(x, int) else SOME_SIZE for x in sizes[:2])
    return dataclasses.replace(launch, queries=queries, keys=keys).first


LAUNCHER = TracingLauncher()


def attention(a: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`kvt::attention` by launches.  Raises CannotTraceError."""
    if a.dropout_p:
        raise CannotTraceError("it has dropout, which inference has not")
    if a.select:
        raise CannotTraceError("its selection makes lists of tiles, which a package does not hold")
    if any(x.device != a.q.device for x in a.captured or ()):
        raise CannotTraceError("a captured tensor is on another device")
    call = AttentionCall.of(a, topk=torch.sym_min(a.topk, a.k.shape[2]))
    _check(call.spec, a.q, a.lowering)
    try:
        return LAUNCHER.forward(call)
    except ValueError as error:
        raise CannotTraceError(f"for some of the sizes it is traced for, {error}") from error


def topk_softmax(a: SoftmaxArguments) -> Tensor:
    """`kvt::topk_softmax` by a launch.  Raises CannotTraceError."""
    spec = SoftmaxSpec.of(a.scores.dtype, a.dtype)
    _check(spec, a.scores, a.lowering)
    return rows.softmax(LAUNCHER, spec, a.scores, a.dim % max(a.scores.dim(), 1), a.topk, a.dtype, a.tolerance)


def _check(spec: KernelSpec | SoftmaxSpec, x: Tensor, lowering: str) -> None:
    if x.device.type != "cuda" or torch.version.hip is not None:
        raise CannotTraceError(f"its tensors are on {'AMD ' * bool(torch.version.hip)}{x.device}, not on an NVIDIA GPU")
    if lowering not in ("auto", "triton"):
        raise CannotTraceError(f"it asks for the lowering {lowering!r}")
    if not has_triton():
        raise CannotTraceError("Triton is not installed")
    if reason := refusal(spec):
        raise CannotTraceError(reason)
    try:
        module_source(spec, contracting=True)
    except NotGenerated as error:
        raise CannotTraceError(str(error)) from error
