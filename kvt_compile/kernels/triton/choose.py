"""Spec, kernel, shapes, device -> block sizes: the one place where a measured choice comes in."""

from __future__ import annotations

import torch

from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import default


def choose(spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int, device: torch.device) -> Blocks:
    """Block sizes for one launch."""
    return default(spec, part, nq, nk)
