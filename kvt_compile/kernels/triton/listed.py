"""A call whose selection makes lists of tiles -> what its kernels take besides.

A tile of a kernel has as many lanes as its block sizes have rows, of backward_kv as many as they have columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvt_compile.kernels import tiles
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton import layout
from kvt_compile.kernels.triton.blocks import Blocks


@dataclass(frozen=True)
class Listed:
    """What lists add to one launch."""

    arguments: dict[str, Any]
    constants: dict[str, bool]
    programs: int


def walks(call: AttentionCall) -> tiles.Walks | None:
    """None where every key is computed."""
    if layout.listing(call.spec) is None:
        return None
    assert call.selection is not None
    return tiles.Walks(call.selection, call.q, call.k, tiles.tables_of(call))


def listed(call: AttentionCall, part: str, blocks: Blocks, every: tiles.Walks) -> Listed:
    """Of one kernel."""
    turned = part == "backward_kv"
    walk = every.of(blocks.cols if turned else blocks.rows, turned)
    arguments = {
        "lane_ptr": walk.lane, "head_lanes": walk.head_lanes, "tiles": walk.tiles,
        "list_ptr": walk.list_of, "list_start_ptr": walk.start,
        "head_tiles": walk.head_tiles, "head_lists": walk.head_lists, "token_ptr": walk.token,
        "may_ptr": walk.may, "block_ptr": walk.block, "width": walk.width,
    }  # fmt: skip
    constants = constants_of(call.spec, part, call.topk < walk.longest, walk.may is not None)
    batch, heads, _ = call.rows
    return Listed(arguments, constants, walk.tiles * batch * (call.k.shape[1] if turned else heads))


def constants_of(spec: KernelSpec, part: str, ranked: bool, partly: bool) -> dict[str, bool]:
    """Compile-time arguments.  ranked: rows may keep fewer keys than a list has; partly: tiles may keep some of a key's
    queries."""
    found = {"RANKED": ranked} if part == "forward" and layout.online(spec) else {}
    return found | ({"PARTLY": partly} if layout.listing(spec) == "tokens" else {})
