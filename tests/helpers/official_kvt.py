"""k-NN attention as KVT's own model spells it (arXiv 2106.00515), written anew from its definition, in a small ViT.

t = scale * q kT;  index = topk(t, k)[1];  mask = 0/1 by scatter;  t = where(mask > 0, t, -inf);  softmax;  @ v
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KNNAttention(nn.Module):
    """x [B, N, C] -> [B, N, C]; every query of every head keeps its `topk` highest-scoring keys."""

    def __init__(self, dim: int, heads: int, topk: int = 100, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.topk, self.scale = heads, topk, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        mask = torch.zeros(batch, self.heads, tokens, tokens, device=x.device, requires_grad=False)
        index = torch.topk(attn, k=self.topk, dim=-1, largest=True)[1]
        mask.scatter_(-1, index, 1.0)
        attn = torch.where(mask > 0, attn, torch.full_like(attn, float("-inf")))
        attn = self.attn_drop(torch.softmax(attn, dim=-1))
        merged = (attn @ v).transpose(1, 2).reshape(batch, tokens, dim)
        out: Tensor = self.proj(merged)
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int, topk: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = KNNAttention(dim, heads, topk)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class KVT(nn.Module):
    """Images [B, 3, size, size] -> class scores; DeiT's shape, a CLS token first."""

    def __init__(
        self, size: int = 224, patch: int = 16, dim: int = 192, heads: int = 3, depth: int = 12, topk: int = 100,
        classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, topk) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out
