"""Spec, kernel and size -> the block sizes worth timing, and the one to use where nothing was timed.

Forward and backward of a call have to agree about every score to the last bit (or about where it lies beside a
threshold set midway), so all kernels of one shape have their scores from the same matrix instruction: `family`.

Defaults come from compilation alone (no spills, tests/golden/triton_resources.json); none has been timed on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.layout import listing, parts
from kvt_compile.kernels.triton.scalar import axes_of

Family = Literal["large", "medium", "small"]
Shape = tuple[int, int, int, int]
PARTS = ("forward", "backward_rows", "backward_q", "backward_kv")
RESIDENT_COLS = 256
"""Longest row that is kept whole by default: from 512 scores a row on nothing fits without spills."""
SMALLEST = 16


def _of(forward: Shape, backward_rows: Shape, backward_q: Shape, backward_kv: Shape) -> dict[str, Shape]:
    return dict(zip(PARTS, (forward, backward_rows, backward_q, backward_kv), strict=True))


# (bytes of an element, features of the wider head up to, family) -> kernel -> rows, cols, warps, stages
_NVIDIA: dict[tuple[int, int, Family], dict[str, Shape]] = {
    (2, 64, "large"): _of((64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1), (64, 64, 4, 1)),
    (2, 128, "large"): _of((64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    (2, 64, "small"): _of((32, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
    (2, 128, "small"): _of((32, 64, 8, 1), (32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (2, 256, "small"): _of((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    (4, 64, "small"): _of((32, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 1), (16, 32, 4, 1)),
    (4, 128, "small"): _of((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
    (4, 256, "small"): _of((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    (8, 256, "small"): _of((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
# a warp is 64 threads: 4 of them are as many as 8 on NVIDIA, and have twice the registers
_AMD: dict[tuple[int, int, Family], dict[str, Shape]] = {
    (2, 64, "medium"): _of((64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1), (64, 64, 4, 1)),
    (2, 128, "medium"): _of((64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    (2, 256, "medium"): _of((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (4, 128, "medium"): _of((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (4, 256, "small"): _of((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    (8, 256, "small"): _of((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def power_of_two(n: int) -> int:
    """The smallest that is not below n, and no smaller than a tile may be."""
    return max(SMALLEST, 1 << max(n - 1, 0).bit_length())


def family(blocks: Blocks, hip: bool = False) -> Family:
    """Which matrix instruction a tile of scores is multiplied by: on NVIDIA from 64 rows on wgmma (sm_90) or tcgen05
    (sm_100) for "large", below mma for "small"; on AMD (`hip`) one of 32 x 32, or for "small" of 16 x 16."""
    if hip:
        return "small" if min(blocks.rows, blocks.cols) < 32 else "medium"
    return "large" if blocks.rows >= 64 else "small"


@lru_cache(maxsize=64)
def has_warpgroups(device: torch.device | None = None) -> bool:
    """Whether a GPU (None: the current one) multiplies by warpgroups, four warps together: sm_90 does.  True where
    there is no GPU to ask."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return True
    return torch.cuda.get_device_capability(device)[0] == 9


def candidates(
    spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int, hip: bool | None = None, warpgroups: bool = True
) -> tuple[Blocks, ...]:
    """Block sizes to time for one kernel: one of PARTS, or "softmax", "softmax_backward".  The default is first."""
    hip = torch.version.hip is not None if hip is None else hip
    first = default(spec, part, nq, nk, hip, warpgroups)
    if isinstance(spec, SoftmaxSpec):
        return (first,)
    found = [first]
    resident = max(32, power_of_two(nk))
    if part == "forward" and resident <= 1024 and nk > 0.55 * resident:
        found += [Blocks("resident", r, resident, w, 1) for r in (16, 32, 64, 128) for w in (4, 8)]
    for rows in (16, 32, 64, 128):
        for cols in (16, 32, 64, 128):
            for warps in (4, 8):
                found += [Blocks("streaming", rows, cols, warps, stages) for stages in (1, 2, 3)]
    size = _width(spec) * _bytes(spec)
    fitting = (
        x
        for x in found
        if x.rows * x.cols <= 128 * 256
        and (x.rows + x.stages * x.cols) * size <= 160 * 1024
        and (x.rows <= 2 * power_of_two(nq) or x.rows == first.rows)
        and family(x, hip) == family(first, hip)
    )
    return tuple(dict.fromkeys((first, *fitting)))


@lru_cache(maxsize=4096)
def may_run(blocks: Blocks, spec: KernelSpec, part: str, nq: int, nk: int, hip: bool | None = None) -> bool:
    """Whether block sizes from a file give what the default gives: scores of the same matrix instruction, and whole
    rows where rows are to be whole.  A file may have been edited, or come from somebody else."""
    hip = torch.version.hip is not None if hip is None else hip
    first = default(spec, part, nq, nk, hip)
    return blocks == first or (
        min(blocks.rows, blocks.cols) >= SMALLEST
        and blocks.rows * blocks.cols <= 128 * 1024
        and blocks.warps <= 16
        and blocks.stages <= 8
        and family(blocks, hip) == family(first, hip)
        and (blocks.kind == "streaming" or (part == "forward" and blocks.cols >= nk))
    )


def default(
    spec: KernelSpec | SoftmaxSpec, part: str, nq: int, nk: int, hip: bool | None = None, warpgroups: bool = True
) -> Blocks:
    """Block sizes where nothing was measured.  `hip`: for AMD; None: as this torch was built.  `warpgroups`: see
    `has_warpgroups`; nothing to AMD.

    Raises ValueError for an unknown kernel."""
    hip = torch.version.hip is not None if hip is None else hip
    if isinstance(spec, SoftmaxSpec):
        return _softmax_default(part, nk)
    if part not in PARTS:
        raise ValueError(f"unknown kernel {part!r}, expected one of {', '.join(PARTS)}")
    size, width = _bytes(spec), _width(spec)
    # what a kernel holds beside a tile of scores and one of captured elements is paid for with half the tile
    crowded = _captured_tiles(spec) > 1 and part != "backward_kv"
    full = crowded or (spec.dropout and part == "forward")
    # rows that stay on chip, 32 at a time; AMD has no matrix instruction for fewer that agrees with the other kernels'
    short = (
        size == 2
        and width <= 64
        and listing(spec) is None
        and nk <= (RESIDENT_COLS // 2 if full and hip else RESIDENT_COLS)
    )
    if short and part == "forward":
        cols = max(32, power_of_two(nk))
        return Blocks("resident", 16 if full and cols == RESIDENT_COLS else 32, cols, 4, 1)
    table = _AMD if hip else _NVIDIA
    large = not hip and size == 2 and width <= 128 and nq >= 64 and not short
    fitting = next(x for x in table if x[0] == size and x[1] >= width and (x[2] == "large") == large)
    rows, cols, warps, stages = table[fitting][part]
    if large and part == "forward" and warpgroups:
        # the 64 rows of one instruction: of two warpgroups each would have half of the columns, and every sum over a
        # row would cross from one to the other: 46 barriers instead of 21 (D = 64 with a bias), no spills in either.
        # On sm_80 it changes no barrier, on sm_100 four warps spill
        warps = 4
    if spec.tables:
        rows, cols, warps = _beside_tables(part, (rows, cols, warps), hip, large, warpgroups)
    elif crowded or (listing(spec) is not None and _lists_crowd(spec, part, size, large and warpgroups, large or hip)):
        cols = max(cols // 2, 32 if hip else SMALLEST)
    return Blocks("streaming", rows, cols, warps, 1 if spec.weight != "p" and part == "forward" else stages)


def _lists_crowd(spec: KernelSpec, part: str, size: int, warpgroups: bool, wide: bool) -> bool:
    """Whether a list's places and bits take registers that half a tile pays for: where whole tiles spill, and halves do
    not."""
    if part == "forward" and size == 2:
        return not warpgroups and (wide or not _captured_tiles(spec))
    return part == "backward_rows" and size == 4


def _beside_tables(
    part: str, shape: tuple[int, int, int], hip: bool, large: bool, warpgroups: bool
) -> tuple[int, int, int]:
    """Rows, columns and warps of a kernel whose condition over tables takes registers, which part of a tile pays for:
    the largest that spill none."""
    rows, cols, warps = shape
    if hip:
        return (32, 32, 4) if part == "forward" else (rows, min(cols, 32), warps)
    if part == "backward_q" or (part == "backward_kv" and not large and warpgroups):
        return shape
    if part == "backward_kv" and large and not warpgroups:
        warps = 8
    share = 4 if part == "forward" and not large and not warpgroups else 2
    return rows, max(cols // share, SMALLEST), warps


def _captured_tiles(spec: KernelSpec) -> int:
    """How many captured elements there are for every score."""
    loads = {*spec.score_loads, *spec.weight_loads}
    return sum(len(frozenset().union(*map(axes_of, x.index))) == 2 for x in loads)


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
        return Blocks("resident", max(1, min(8, 1024 // whole)), whole, 4, 1)
    return Blocks("streaming", 4, min(512, whole), 4, 1)
