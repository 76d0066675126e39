"""GPUs that kernels are compiled for, which kernels a spec has, and how they multiply float32."""

from __future__ import annotations

import torch

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Name -> Triton's backend, architecture, threads of a warp."""
WARPGROUPS = ("sm_90",)
"""Whose matrix instructions are given by four warps together and sum into their registers."""
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory a program may have (CUDA programming guide, table of compute capabilities; CDNA 3 manual)."""


def parts_of(spec: KernelSpec | SoftmaxSpec) -> tuple[str, ...]:
    """The kernels that the module of a spec holds."""
    if isinstance(spec, SoftmaxSpec):
        return "softmax", "softmax_backward"
    if not spec.needs_grad:
        return ("forward",)
    found = ["backward_rows"]
    if spec.needs_grad[0] or any(spec.needs_grad[3:]):
        found.append("backward_q")
    if any(spec.needs_grad[1:3]):
        found.append("backward_kv")
    return tuple(found)


def precision(spec: KernelSpec, hip: bool | None = None) -> str:
    """How float32 operands are multiplied: truly, unless the user allows TF32 for matrix products on CUDA, by
    `torch.set_float32_matmul_precision` or one of `torch.backends`' `fp32_precision`.

    The setting may change at any time: ask at every launch.  Three TF32 products per product give float32's digits on
    NVIDIA's matrix units; AMD's multiply float32 as it is.
    """
    if hip is None:
        hip = torch.version.hip is not None
    if "float32" not in (spec.dtype, spec.value_dtype) or "float64" in (spec.dtype, spec.value_dtype) or hip:
        return "ieee"
    # this one follows both ways of setting it; get_float32_matmul_precision raises once the other was used
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
