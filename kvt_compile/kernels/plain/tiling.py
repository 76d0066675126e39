"""Op arguments -> tiles: the pieces of the [B, Hq, Nq, Nk] score space that the ATen lowering holds one at a time.

    B, Hq, Hk, Nq, Nk  ->  (batch range x key-head range)  ->  its query ranges; every tile has all Nk keys

The plan depends on shapes and the device type only, so that a backward sees the forward's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# Elements of one score tile. CPU: time is flat from 2^17 to 2^21 (N = 197 and 1025, D = 64). Elsewhere: few launches.
CPU_BUDGET = 1 << 19
DEVICE_BUDGET = 1 << 25
# Rows of one tile: memory must grow with Nk, not with Nq * Nk, also where the budget would hold a whole head.
MAX_ROWS = 256


@dataclass(frozen=True)
class Tile:
    """Ranges of batch, query heads, key heads and queries."""

    b: range
    hq: range
    hk: range
    i: range

    def rows(self, x: Tensor) -> Tensor:
        """The part of a query-side tensor: `[B, Hq, Nq, X]` -> `[b, hq, i, X]`, a view."""
        return x[_slice(self.b), _slice(self.hq), _slice(self.i)]

    def group(self, x: Tensor) -> Tensor:
        """`[b, hq, i, X]` -> `[b, hk, (hq/hk)*i, X]`: query heads that share a key head become rows of one product."""
        shared = len(self.hq) // len(self.hk)
        return x.reshape(len(self.b), len(self.hk), shared * len(self.i), x.shape[-1])

    def ungroup(self, x: Tensor) -> Tensor:
        """The inverse of `group`."""
        return x.view(len(self.b), len(self.hq), len(self.i), x.shape[-1])


@dataclass(frozen=True)
class Heads:
    """A batch range and a key-head range, and the tiles over them."""

    b: range
    hk: range
    group: int
    queries: int
    rows: int

    def of(self, x: Tensor) -> Tensor:
        """The part of a key-side tensor: `[B, Hk, Nk, X]` -> `[b, hk, Nk, X]`, a view."""
        return x[_slice(self.b), _slice(self.hk)]

    def tiles(self) -> Iterator[Tile]:
        hq = range(self.hk.start * self.group, self.hk.stop * self.group)
        return (Tile(self.b, hq, self.hk, i) for i in chunks(self.queries, self.rows))


def plan(batch: int, heads: int, kv_heads: int, queries: int, keys: int, device: str) -> Iterator[Heads]:
    """Pieces whose tiles have at most the budget's elements, or one row for each query head of one key head."""
    budget = budget_of(device)
    group = heads // kv_heads if kv_heads else 1
    rows = max(1, min(queries, MAX_ROWS, budget // max(keys * group, 1)))
    left = budget // max(rows * keys * group, 1)
    step_h = max(1, min(kv_heads, left))
    step_b = max(1, min(batch, left // step_h)) if step_h == kv_heads else 1
    return (Heads(b, hk, group, queries, rows) for b in chunks(batch, step_b) for hk in chunks(kv_heads, step_h))


def budget_of(device: str) -> int:
    """How many elements of a score tile to hold at a time on a device type."""
    return CPU_BUDGET if device == "cpu" else DEVICE_BUDGET


def chunks(length: int, step: int) -> Iterator[range]:
    """0..length in ranges of at most `step`."""
    return (range(start, min(start + step, length)) for start in range(0, length, step))


def _slice(x: range) -> slice:
    return slice(x.start, x.stop)
