"""Spec, kernel and size -> the block sizes worth timing, and the one to use where nothing was timed.

Defaults come from compilation alone (no spills on any target of `tests/golden/triton/resources.json`): none of them has
been timed on a GPU.
"""

from __future__ import annotations

import math

from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.layout import parts

PARTS = ("forward", "backward_rows", "backward_q", "backward_kv")
RESIDENT_COLS = 256
"""Longest row that is kept whole by default."""
SMALLEST = 16


def power_of_two(n: int) -> int:
    """The smallest that is not below n, and no smaller than a tile may be."""
    return max(SMALLEST, 1 << max(n - 1, 0).bit_length())


def candidates(spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int) -> tuple[Blocks, ...]:
    """Block sizes to time for one kernel (`part`, one of PARTS, or "softmax", "softmax_backward"); the default is first."""
    first = default(spec, part, nq, nk)
    if isinstance(spec, SoftmaxSpec):
        return (first,)
    found = [first]
    widest = _width(spec)
    resident = power_of_two(nk)
    if part == "forward" and resident <= 1024 and nk > 0.55 * resident:
        for rows, warps in ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)):
            if rows * resident <= 128 * 256:
                found.append(Blocks("resident", rows, resident, warps, 1))
    for rows in (16, 32, 64, 128):
        for cols in (16, 32, 64, 128):
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    fits = (rows + stages * cols) * widest * _bytes(spec) <= 160 * 1024
                    if fits and 1024 <= rows * cols <= 128 * 128:
                        found.append(Blocks("streaming", rows, cols, warps, stages))
    sensible = (x for x in found if x == first or x.rows <= 2 * power_of_two(nq))
    return tuple(dict.fromkeys(sensible))


def default(spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int) -> Blocks:
    """Block sizes where nothing is known about the GPU."""
    if isinstance(spec, SoftmaxSpec):
        return _softmax_default(part, nk)
    if part not in PARTS:
        raise ValueError(f"unknown kernel {part!r}, expected one of {', '.join(PARTS)}")
    size = _bytes(spec)
    width = _width(spec)
    rows, cols, warps, stages = _streaming(part, size, width)
    if part == "forward" and nk <= RESIDENT_COLS and size < 8:
        resident = power_of_two(nk)
        return Blocks("resident", _rows(64 if resident * size <= 512 else 32, nq), resident, 4, 1)
    if part == "backward_kv":
        return Blocks("streaming", rows, min(cols, power_of_two(nk)), warps, stages)
    return Blocks("streaming", _rows(rows, nq), cols, warps, stages)


def _rows(rows: int, nq: int) -> int:
    return min(rows, power_of_two(nq))


def _bytes(spec: KernelSpec) -> int:
    """Of the widest element that is multiplied."""
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    return max(sizes[spec.dtype], sizes[spec.value_dtype])


def _width(spec: KernelSpec) -> int:
    """Features of the wider operand, padded."""
    return max(sum(part.width for part in parts(x)) for x in (spec.head_dim, spec.value_dim))


def _streaming(part: str, size: int, width: int) -> tuple[int, int, int, int]:
    """(rows, cols, warps, stages) by element size and head width."""
    forward = part in ("forward", "backward_rows")
    if size == 8:
        return 16, 16, 4, 1
    if size == 4:
        if width <= 64:
            return (32, 32, 4, 2) if forward else (32, 32, 4, 1)
        return (16, 32, 4, 1) if width <= 128 else (16, 16, 4, 1)
    if width <= 64:
        return (64, 64, 4, 2) if forward else (64, 64, 8, 1)
    if width <= 128:
        return (64, 64, 4, 2) if forward else (64, 32, 8, 1)
    return (64, 32, 8, 1) if forward else (32, 32, 8, 1)


def _softmax_default(part: str, nk: int) -> Blocks:
    whole = power_of_two(nk)
    if part == "softmax" and whole <= 8192:
        warps = 4 if whole <= 2048 else 8
        rows = max(1, min(16, 1 << int(math.log2(4096 // min(whole, 4096)))))
        return Blocks("resident", rows, whole, warps, 1)
    return Blocks("streaming", 4, min(1024, whole), 4, 1)
