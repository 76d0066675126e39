"""The bars: which ratio of which cells must be, and should be, how large on an H100 or H200.  Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.cells import Cell

MODEL = "time / dense"
"""Ratio of the model's step."""


@dataclass(frozen=True)
class Bar:
    """A ratio that should be at most (or at least) so large, in every cell that it is about."""

    name: str
    ratio: str
    must: float
    aim: float | None = None
    at_least: bool = False
    of: Callable[[Cell], bool] = lambda cell: False

    def text(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.must:g}" + (f" ({self.aim:g})" if self.aim else "")

    def met(self, ratio: float, limit: float | None = None) -> bool:
        limit = self.must if limit is None else limit
        return ratio >= limit if self.at_least else ratio <= limit

    def worst(self, ratios: list[float]) -> float:
        return min(ratios) if self.at_least else max(ratios)


def _main(cell: Cell) -> bool:
    return cell.dtype == "bfloat16" and cell.dim == 64 and cell.part == 2


BARS = (
    Bar("forward, N ≤ 256, against SDPA", "time / sdpa", 2.0, 1.3,
        of=lambda c: _main(c) and not c.backward and c.size <= 256),
    Bar("forward, longer, against SDPA", "time / sdpa", 2.5, 1.5,
        of=lambda c: _main(c) and not c.backward and c.size > 256),
    Bar("forward + backward, against SDPA", "time / sdpa", 1.4, 1.15, of=lambda c: _main(c) and c.backward),
    Bar("eager KVT, against ours, forward", "eager / time", 10.0, 20.0, True, lambda c: _main(c) and not c.backward),
    Bar("compiled KVT, against ours, forward", "compiled / time", 5.0, 10.0, True,
        lambda c: _main(c) and not c.backward),
    Bar("peak memory, against SDPA", "memory / sdpa", 1.1, of=_main),
    Bar("window 13 x 13 at 64 x 64, forward, of dense SDPA", "time / sdpa", 0.15,
        of=lambda c: c.window == 13 and not c.backward),
    Bar("window 13 x 13 at 64 x 64, forward + backward, of dense SDPA", "time / sdpa", 0.20,
        of=lambda c: c.window == 13 and c.backward),
    Bar("FlexAttention with its block mask, against ours, window", "flex / time", 4.0, None, True,
        lambda c: c.window == 13),
    Bar("ViT-B/16 training step, AMP, batch 128, against dense torch.compile", MODEL, 1.10, 1.03),
)  # fmt: skip


def bars_of(cell: Cell) -> list[Bar]:
    return [bar for bar in BARS if bar.of(cell)]
