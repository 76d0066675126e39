"""Block sizes -> a kernel's compile-time arguments, and how Triton compiles it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvt_compile.kernels.triton.blocks import Blocks


def constexprs(
    part: str, blocks: Blocks, index: str, products: str | None, listed: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """The compile-time arguments of a kernel.  index: "int32" or "int64"; products: see `targets.precision`; listed: of
    a kernel with lists of tiles, see `listed.constants_of`."""
    import triton.language as tl

    values: dict[str, Any] = {"ROWS": blocks.rows, "COLS": blocks.cols, "STAGES": blocks.stages}
    values["INDEX"] = getattr(tl, index)
    if products is not None:
        values["PRECISION"] = products
    if listed is not None:
        values |= listed
    elif part in ("forward", "softmax"):
        values["RESIDENT"] = blocks.kind == "resident"
    return values


def options(blocks: Blocks) -> dict[str, Any]:
    """How a kernel is compiled.  Nothing is contracted into a multiply-add: two kernels that contract the same
    expression in two ways would disagree about the last bit of a score, and so about a key."""
    return {"num_warps": blocks.warps, "enable_fp_fusion": False}
