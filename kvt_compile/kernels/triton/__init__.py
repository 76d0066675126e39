"""KernelSpec -> Triton kernels for a GPU, generated, compiled by Triton at the first launch.

    generate   spec -> source            module      source -> kernels         launch     tensors -> call -> tensors
    scalar     expression -> Triton      candidates  block sizes               lowering   the lowering "triton"
    slopes     its derivatives           choose      which of them             rows       kvt::topk_softmax
    bounds     which tiles a mask skips  compile     resources, without a GPU  interpret  kernels on CPU tensors

Triton itself is imported only where kernels are built.  The kernels are explained in docs/kernel.md.
"""

from __future__ import annotations

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import default
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.lowering import LOWERING, TritonLowering, refusal
from kvt_compile.kernels.triton.targets import TARGETS, WARPGROUPS, parts_of, precision

__all__ = ["LOWERING", "TARGETS", "Blocks", "TritonLowering", "refusal", "source"]


def source(spec: KernelSpec | SoftmaxSpec, target: str = "sm_90", queries: int = 1024, keys: int = 1024) -> str:
    """The Triton source of a spec's kernels, with the compile-time arguments that `target` gets for such a size, on any
    machine, with or without Triton: of the forward, or of the backward where the spec says what needs a gradient.

    Raises ValueError for a target that is not one of TARGETS, NotGenerated with the reason.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown GPU {target!r}, expected one of {', '.join(TARGETS)}")
    lines = [f"# for {target}, {queries} queries and {keys} keys:"]
    for part in parts_of(spec):
        x = default(spec, part, queries, keys, target.startswith("gfx"), target in WARPGROUPS)
        shape = f"ROWS={x.rows}, COLS={x.cols}, STAGES={x.stages}"
        if part in ("forward", "softmax"):
            shape += f", RESIDENT={x.kind == 'resident'}"
        if isinstance(spec, KernelSpec):
            shape += f', PRECISION="{precision(spec, target.startswith("gfx"))}"'
        lines.append(f"#     {part}[...](..., {shape}, num_warps={x.warps}, enable_fp_fusion=False)")
    return "\n".join(lines) + "\n" + module_source(spec)
