"""How many tokens there are, and the shape of the image -> which token is which: prefix tokens, then a grid of patches.

197 tokens, a square image      ->   1 prefix token (CLS),  14 x 14 patches
201 tokens                      ->   5 prefix tokens (CLS and 4 registers),  14 x 14 patches
 77 tokens, no image            ->   a line of 77
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PREFIX = 16
"""Prefix tokens to expect at most, where nobody says how many there are (DINOv2: CLS and 4 registers)."""


@dataclass(frozen=True)
class Tokens:
    """`prefix` tokens without a place, then rows x columns patches, row by row; rows = 1 where there is no image."""

    prefix: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.prefix + self.rows * self.columns

    def place(self, token: int) -> tuple[int, int] | None:
        """(row, column) of a token; None for a prefix token."""
        return None if token < self.prefix else divmod(token - self.prefix, self.columns)

    def name(self, token: int) -> str:
        """`CLS`, `prefix 2`, `patch (3, 4)` or `token 5`."""
        place = self.place(token)
        if place is None:
            return "CLS" if token == 0 else f"prefix {token}"
        return f"token {token}" if self.rows == 1 else f"patch ({place[0]}, {place[1]})"

    def coordinates(self, like: Tokens | None = None) -> Tensor:
        """[rows * columns, 2]: centre of each patch, in patches of `like` (default: its own)."""
        like = like or self
        rows = (torch.arange(self.rows) + 0.5) * (like.rows / self.rows)
        columns = (torch.arange(self.columns) + 0.5) * (like.columns / self.columns)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)


def infer_tokens(
    count: int, aspect: float | None, prefix: int | None = None, grid: tuple[int, int] | None = None
) -> Tokens:
    """The layout of `count` tokens of an image whose height is `aspect` times its width (None: no image, a line).

    What is given is taken as it is; else the fewest prefix tokens (at most MOST_PREFIX) that leave a grid of the
    image's shape, and a line of tokens where none does.

    Raises ValueError where what is given does not add up to `count`.
    """
    if grid is not None:
        rows, columns = grid
        found = count - rows * columns if prefix is None else prefix
        if rows < 1 or columns < 1 or found < 0 or found + rows * columns != count:
            raise ValueError(
                f"prefix={prefix} and grid={grid} make {rows * columns + (prefix or 0)} tokens, but this attention has "
                f"{count}"
            )
        return Tokens(found, rows, columns)
    if prefix is not None and not 0 <= prefix < count:
        raise ValueError(f"prefix={prefix} is not between 0 and the number of tokens of this attention, {count}")
    if aspect is not None:
        for candidate in range(min(MOST_PREFIX, count - 1) + 1) if prefix is None else (prefix,):
            if shape := _grid(count - candidate, aspect):
                return Tokens(candidate, *shape)
    return Tokens(prefix or 0, 1, count - (prefix or 0))


def _grid(patches: int, aspect: float) -> tuple[int, int] | None:
    """(rows, columns) with that product and, to less than a row, that ratio."""
    rows = round(math.sqrt(patches * aspect))
    if rows < 1 or patches % rows:
        return None
    columns = patches // rows
    return (rows, columns) if abs(rows - columns * aspect) < min(1.0, max(aspect, 1.0) * 0.5) else None
