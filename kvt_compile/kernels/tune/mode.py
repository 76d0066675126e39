"""Which kernels the user wants tuned: KernelSpec -> "off" | "cached" | "on".

The mode changes no result, so it is no argument of an op: it belongs to the generated kernel, and every model of the
process that computes the same thing runs the same kernel.  Whoever asked last decides.  Kept here and not in a context
around the call, because a backward runs in autograd's own threads, which see no such context.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Literal

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec

Mode = Literal["off", "cached", "on"]
DEFAULT: Mode = "cached"

_requested: dict[KernelSpec | SoftmaxSpec, Mode] = {}


def request(spec: KernelSpec | SoftmaxSpec, mode: Mode) -> None:
    """From now on the kernels of `spec`, forward and backward, are tuned as `mode` says."""
    _requested[_of_forward(spec)] = mode


def requested(spec: KernelSpec | SoftmaxSpec) -> Mode:
    """What was asked for, `DEFAULT` where nothing was."""
    return _requested.get(_of_forward(spec), DEFAULT)


@lru_cache(maxsize=4096)
def _of_forward(spec: KernelSpec | SoftmaxSpec) -> KernelSpec | SoftmaxSpec:
    return dataclasses.replace(spec, needs_grad=()) if isinstance(spec, KernelSpec) else spec
