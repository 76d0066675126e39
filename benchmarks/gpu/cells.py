"""The benchmark's cells and who competes in them, the most telling first.  Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS = 32768
WIDTH = 768
OURS, TOLERANT, SDPA, FLEX, EAGER, COMPILED = "ours", "ours 0.02", "sdpa", "flex", "eager", "compiled"
TOLERANCE = 0.02


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and pass."""

    dtype: str
    dim: int
    size: int
    topk: int
    backward: bool
    window: int = 0
    """Of a square grid, with which no key is ranked: so many keys on each axis; 0: none."""

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.size)

    @property
    def heads(self) -> int:
        return WIDTH // self.dim

    @property
    def part(self) -> int:
        """k is N divided by it."""
        return round(self.size / self.topk)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Where tokens stand, of a cell with a window."""
        return (math.isqrt(self.size),) * 2 if self.window else None

    @property
    def select(self) -> str:
        return f"window({self.window})" if self.window else ""

    def __str__(self) -> str:
        kept = f"{self.select} at {self.grid[0]}x{self.grid[1]}" if self.grid else f"k=N/{self.part}"
        return f"{self.dtype} D={self.dim} N={self.size} {kept} {'fwd+bwd' if self.backward else 'forward'}"


@dataclass(frozen=True)
class Race:
    """A cell and the contestants that take turns in it."""

    cell: Cell
    contestants: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.cell}: {', '.join(self.contestants)}"


QUICK = (OURS, TOLERANT, SDPA, EAGER)
"""Nothing but our kernels has to be compiled."""
SLOW = (OURS, FLEX, COMPILED)


def cells(dtype: str, dim: int, sizes: tuple[int, ...], part: int = 2) -> list[Cell]:
    return [Cell(dtype, dim, size, -(-size // part), backward) for size in sizes for backward in (False, True)]


def races() -> list[Race]:
    """Every race: the bars' cells against what is quick to build, the same against what torch has to compile, a window
    of neighbours, then single precision, wide heads, long rows, and what lies between."""
    main = cells("bfloat16", 64, (197, 1024, 4096))
    others = (
        *cells("float32", 64, (197, 1024, 4096)),
        *cells("bfloat16", 128, (197, 1024, 4096)),
        *cells("bfloat16", 64, (16384,)),
        *cells("bfloat16", 64, (256, 576, 2048)),
        *cells("bfloat16", 64, (197, 1024, 4096), part=8),
        *cells("float32", 128, (1024,)),
    )
    windows = [Cell("bfloat16", 64, 4096, 4096, backward, window=13) for backward in (False, True)]
    return [
        *(Race(cell, contestants) for contestants in (QUICK, SLOW) for cell in main),
        *(Race(cell, (OURS, SDPA, FLEX)) for cell in windows),
        *(Race(cell, QUICK) for cell in others),
    ]
