"""Spec, kernel and size -> the block sizes worth timing, and the one to use where nothing was timed.

Forward and backward of a call have to agree about every score to the last bit (or about where it lies beside a threshold
set midway), so all kernels of one shape have their scores from the same matrix instruction: `family`.  A tile of 64 rows
is multiplied by wgmma on sm_90 and tcgen05 on sm_100, a smaller one by mma; an AMD instruction is 32 or 16 wide.

Defaults come from compilation alone (no spills, tests/golden/triton_resources.json); none has been timed on a GPU.
"""

from __future__ import annotations

from typing import Literal

from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.layout import parts

Family = Literal["large", "medium", "small"]
PARTS = ("forward", "backward_rows", "backward_q", "backward_kv")
RESIDENT_COLS = 256
"""Longest row that is kept whole by default: from 512 scores a row on nothing fits without spills."""
SMALLEST = 16

_DEFAULTS: dict[tuple[int, int, Family], dict[str, tuple[int, int, int, int]]] = {
    # (bytes of an element, features of the wider head up to, family): kernel -> rows, cols, warps, stages
    (2, 64, "large"): {
        "forward": (64, 64, 8, 2),
        "backward_rows": (64, 64, 4, 2),
        "backward_q": (64, 32, 4, 1),
        "backward_kv": (64, 64, 4, 1),
    },
    (2, 64, "medium"): {
        "forward": (32, 64, 8, 2),
        "backward_rows": (32, 64, 4, 2),
        "backward_q": (32, 64, 4, 1),
        "backward_kv": (32, 64, 4, 1),
    },
    (2, 256, "large"): {x: (64, 32, 8, 1) for x in PARTS},
    (2, 256, "medium"): {x: (32, 32, 8, 1) for x in PARTS},
    (4, 128, "medium"): {x: (32, 32, 8, 1) for x in PARTS},
    (4, 256, "small"): {x: (16, 16, 8, 1) for x in PARTS},
    (8, 256, "small"): {x: (16, 16, 4, 1) for x in PARTS},
}


def power_of_two(n: int) -> int:
    """The smallest that is not below n, and no smaller than a tile may be."""
    return max(SMALLEST, 1 << max(n - 1, 0).bit_length())


def family(blocks: Blocks) -> Family:
    """Which matrix instruction a tile of scores is multiplied by."""
    if min(blocks.rows, blocks.cols) < 32:
        return "small"
    return "large" if blocks.rows >= 64 else "medium"


def family_of(spec: KernelSpec, nq: int, nk: int) -> Family:
    """The one that every kernel of a shape uses."""
    size, width = _bytes(spec), _width(spec)
    if size == 2:
        # short rows stay on chip, 32 of them at a time
        return "large" if nq >= 64 and (nk > RESIDENT_COLS or width > 64) else "medium"
    return "medium" if size == 4 and width <= 128 else "small"


def candidates(spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int) -> tuple[Blocks, ...]:
    """Block sizes to time for one kernel: one of PARTS, or "softmax", "softmax_backward".  The default is first."""
    first = default(spec, part, nq, nk)
    if isinstance(spec, SoftmaxSpec):
        return (first,)
    found = [first]
    resident = max(32, power_of_two(nk))
    rows = {"large": (64, 128), "medium": (32,), "small": (16,)}[family_of(spec, nq, nk)]
    if part == "forward" and resident <= 1024 and nk > 0.55 * resident:
        found += [Blocks("resident", r, resident, w, 1) for r in rows for w in (4, 8) if r * resident <= 128 * 256]
    for cols in (16, 32, 64, 128):
        for r in rows:
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    if (r + stages * cols) * _width(spec) * _bytes(spec) <= 160 * 1024:
                        found.append(Blocks("streaming", r, cols, warps, stages))
    return tuple(dict.fromkeys(x for x in found if family(x) == family(first)))


def default(spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int) -> Blocks:
    """Block sizes where nothing is known about the GPU.  Raises ValueError for an unknown kernel."""
    if isinstance(spec, SoftmaxSpec):
        return _softmax_default(part, nk)
    if part not in PARTS:
        raise ValueError(f"unknown kernel {part!r}, expected one of {', '.join(PARTS)}")
    size, width, kind = _bytes(spec), _width(spec), family_of(spec, nq, nk)
    if part == "forward" and size == 2 and width <= 64 and nk <= RESIDENT_COLS:
        return Blocks("resident", 32, max(32, power_of_two(nk)), 4, 1)
    fitting = next(x for x in _DEFAULTS if x[0] == size and x[1] >= width and x[2] == kind)
    return Blocks("streaming", *_DEFAULTS[fitting][part])


def _bytes(spec: KernelSpec) -> int:
    """Of the widest element that is multiplied."""
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    return max(sizes[spec.dtype], sizes[spec.value_dtype])


def _width(spec: KernelSpec) -> int:
    """Features of the wider head, padded."""
    return max(sum(part.width for part in parts(x)) for x in (spec.head_dim, spec.value_dim))


def _softmax_default(part: str, nk: int) -> Blocks:
    whole = power_of_two(nk)
    if part == "softmax" and whole <= 4096:
        return Blocks("resident", max(1, min(16, 2048 // whole)), whole, 4, 1)
    return Blocks("streaming", 4, min(512, whole), 4, 1)
