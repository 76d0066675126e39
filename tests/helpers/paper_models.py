"""The two architectures of the KVT paper that no package ships, small, after their papers.

T2T-ViT-t   Tokens-to-Token ViT (arXiv 2101.11986) with the Transformer variant of the T2T module: soft splits (unfold)
            with one attention after each of the first two, whose values are also its residual, then a plain ViT
So-ViT      arXiv 2104.10935: convolutional tokens, a plain ViT, and a classifier of the class token plus the
            second-order cross-covariance of the visual tokens, normalised by its largest singular value: a product
            of tokens, no attention
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """As in the authors' code: q, k, v from one layer, softmax(q kT * scale), dropout, v."""

    def __init__(self, width: int, heads: int, inner: int | None = None) -> None:
        super().__init__()
        self.heads, self.inner = heads, inner or width
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * self.inner, bias=False)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(self.inner, self.inner), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the values as tokens [B, N, inner]."""
        size, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(size, tokens, 3, self.heads, self.inner // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        out = (attn @ v).transpose(1, 2).reshape(size, tokens, self.inner)
        return self.proj_drop(self.proj(out)), v.transpose(1, 2).reshape(size, tokens, self.inner)


def mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))[0]
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class TokenTransformer(nn.Module):
    """Attention that changes the width: its residual is the values."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, 1, inner)
        self.norm2, self.mlp = nn.LayerNorm(inner), mlp(inner, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        out, values = self.attn(self.norm1(x))
        x = values + out
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class T2TViT(nn.Module):
    """[B, 3, S, S] -> [B, classes]; S a multiple of 16.  T2T-ViT-t-19 has width 448, 7 heads, 19 blocks, inner 64."""

    def __init__(self, image: int = 64, width: int = 48, heads: int = 3, depth: int = 2, inner: int = 16) -> None:
        super().__init__()
        self.split0, self.split1, self.split2 = nn.Unfold(7, 1, 2, 4), nn.Unfold(3, 1, 1, 2), nn.Unfold(3, 1, 1, 2)
        self.attention1, self.attention2 = TokenTransformer(3 * 49, inner), TokenTransformer(9 * inner, inner)
        self.project = nn.Linear(9 * inner, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // 16) ** 2 + 1, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, 3.0) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split0(x).transpose(1, 2)
        for transformer, split in ((self.attention1, self.split1), (self.attention2, self.split2)):
            x = transformer(x)
            size, tokens, width = x.shape
            side = int(tokens**0.5)
            x = split(x.transpose(1, 2).reshape(size, width, side, side)).transpose(1, 2)
        x = self.project(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class CrossCovariance(nn.Module):
    """Multi-head cross-covariance of two projections of the tokens, over its largest singular value to the power 1/2.

    The singular value comes from one step of the power method, as the paper's fast approximation does.
    """

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.left, self.right = nn.Linear(width, heads * size), nn.Linear(width, heads * size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        left, right = (p(x).reshape(batch, tokens, self.heads, self.size) for p in (self.left, self.right))
        covariance = left.permute(0, 2, 3, 1) @ right.permute(0, 2, 1, 3) / tokens
        ones = torch.ones(batch, self.heads, self.size, 1, dtype=x.dtype, device=x.device)
        u = F.normalize(covariance @ ones, dim=-2)
        v = covariance.transpose(-2, -1) @ u
        sigma = v.norm(dim=-2, keepdim=True)
        return (covariance / sigma.sqrt()).flatten(1)


class SoViT(nn.Module):
    """[B, 3, S, S] -> [B, classes]; S a multiple of 16.  So-ViT-7 has width 256, 4 heads, 7 blocks."""

    def __init__(self, image: int = 64, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        widths = (3, 8, 16, 32, width)
        self.tokens = nn.Sequential(
            *(
                layer
                for a, b in itertools.pairwise(widths)
                for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            )
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // 16) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, 3.0) for _ in range(depth))
        self.norm, self.covariance = nn.LayerNorm(width), CrossCovariance(width, 2, 6)
        self.head, self.visual_head = nn.Linear(width, 10), nn.Linear(2 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x[:, 0]) + self.visual_head(self.covariance(x[:, 1:]))
        return logits
