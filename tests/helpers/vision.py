"""Small vision transformers whose tokens stand on a grid that can be read from the graph, or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Change = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.proj = (
            heads,
            nn.LayerNorm(dim),
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class Transformer(nn.Module):
    """A vision transformer of two blocks; `change` is what happens to the tokens before the blocks."""

    def __init__(self, prefix: int = 1, change: Change = lambda x: x, grid: tuple[int, int] | None = (5, 7)) -> None:
        super().__init__()
        self.patch, self.change, self.prefix = nn.Conv2d(3, 16, 4, 4), change, prefix
        self.cls = nn.Parameter(torch.randn(1, prefix, 16))
        # without a place for each token images may have any size
        self.place = None if grid is None else nn.Parameter(torch.randn(1, grid[0] * grid[1], 16))
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = self.change(x if self.place is None else x + self.place)
        if self.prefix:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block(x)
            x = x + self.mlp(x)
        return x


class Windowed(nn.Module):
    """Windows of 4 x 4 tokens of a map of 8 x 12."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 16, 2, 2), Attention()

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 4, 4, width // 4, 4, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, dim)
        return self.block(x)
