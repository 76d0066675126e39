"""The benchmark's cells and who competes in them, the most telling first.  Standard library only."""

from __future__ import annotations

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

    def __str__(self) -> str:
        return f"{self.dtype} D={self.dim} N={self.size} k=N/{self.part} {'fwd+bwd' if self.backward else 'forward'}"


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
    """Every race: the bars' cells against what is quick to build, the same against what torch has to compile, then
    single precision, wide heads, long rows, and what lies between."""
    main = cells("bfloat16", 64, (197, 1024, 4096))
    others = (
        *cells("float32", 64, (197, 1024, 4096)),
        *cells("bfloat16", 128, (197, 1024, 4096)),
        *cells("bfloat16", 64, (16384,)),
        *cells("bfloat16", 64, (256, 576, 2048)),
        *cells("bfloat16", 64, (197, 1024, 4096), part=8),
        *cells("float32", 128, (1024,)),
    )
    return [Race(cell, contestants) for contestants in (QUICK, SLOW) for cell in main] + [
        Race(x, QUICK) for x in others
    ]
