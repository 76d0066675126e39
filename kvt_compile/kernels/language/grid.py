"""What the names of a score expression stand for in one tile: coordinates, captured tensors, sizes.

b, h, i, j  ->  int64 ranges        c0[h, i, j]  ->  a view of captured tensor 0, where a view can say it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels.language import score as language

Value = Tensor | float | int | bool
AXES = "bhij"


@dataclass
class Grid:
    """The coordinates of one tile: a range per axis, and the device and accumulation dtype its values have."""

    b: range
    h: range
    i: range
    j: range
    device: torch.device
    dtype: torch.dtype
    _cache: dict[str, Tensor] = field(default_factory=dict)

    def extent(self, axis: str) -> range:
        return cast(range, getattr(self, axis))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.b), len(self.h), len(self.i), len(self.j)

    def coordinate(self, axis: str) -> Tensor:
        """int64, the axis' length along its own dimension and 1 along the others."""
        if axis not in self._cache:
            extent = self.extent(axis)
            shape = [1, 1, 1, 1]
            shape[AXES.index(axis)] = len(extent)
            self._cache[axis] = torch.arange(extent.start, extent.stop, device=self.device).view(shape)
        return self._cache[axis]


@dataclass
class Environment:
    """What the names of an expression stand for in one tile."""

    grid: Grid
    captured: Sequence[Tensor]
    sizes: Sequence[int]
    s: Tensor | None = None
    p: Tensor | None = None
    gradient: Tensor | None = None


Program = Callable[[Environment], Value]


@lru_cache(maxsize=4096)
def _plain_axes(load: language.load) -> tuple[str | int, ...] | None:
    """Per dimension of the captured tensor the axis or constant that indexes it; None unless all are that simple."""
    plain: list[str | int] = []
    for index in load.index:
        if isinstance(index, sympy.Integer) and index >= 0:
            plain.append(int(index))
        elif str(index) in AXES and str(index) not in plain:
            plain.append(str(index))
        else:
            return None
    return tuple(plain)


def plain_view(load: language.load, tensor: Tensor, grid: Grid) -> Tensor | None:
    """The elements a load means in a tile, `[b or 1, h or 1, i or 1, j or 1]`, as a view; None if its indices are not
    distinct plain coordinates and constants, or leave the tensor."""
    plain = _plain_axes(load)
    if plain is None:
        return None
    if not plain:
        return tensor  # stays 0-d: such a tensor may be on the CPU while all others are not
    for dim in range(len(plain) - 1, -1, -1):
        index = plain[dim]
        if isinstance(index, int):
            if index >= tensor.shape[dim]:
                return None  # out of range: the general path clamps it
            tensor = tensor.select(dim, index)
        else:
            extent = grid.extent(index)
            if extent.stop > tensor.shape[dim]:
                return None
            tensor = tensor.narrow(dim, extent.start, len(extent))
    axes = [x for x in plain if isinstance(x, str)]
    order = sorted(range(len(axes)), key=lambda dim: AXES.index(axes[dim]))
    tensor = tensor.permute(order)
    for position, axis in enumerate(AXES):
        if axis not in axes:
            tensor = tensor.unsqueeze(position)
    return tensor
