"""A small vision transformer and a small causal language model, written as such models are, for tests on many ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvt_compile

WIDTH, HEADS, KEY_HEADS, LAYERS = 32, 4, 2, 2
TOPKS: tuple[float | None, ...] = (5,) * LAYERS
OPTIONS: dict[str, Any] = {"topk": 5, "lowering": "aten", "then": "aot_eager"}
"""Without compilers, whose time is not what these tests are about."""


class Attention(nn.Module):
    """Projections of their own for q, k and v: what tensor parallelism cuts."""

    by_hand = False
    """Whether it calls `topk_attention` itself: what a model that is not compiled computes."""

    def __init__(self, causal: bool, key_heads: int) -> None:
        super().__init__()
        self.causal, self.size, self.topk = causal, WIDTH // HEADS, TOPKS[0]
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, key_heads * self.size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        if self.by_hand:
            topk = 1.0 if self.topk is None else self.topk
            out = kvt_compile.topk_attention(
                q, k, v, topk=topk, is_causal=self.causal, enable_gqa=self.causal, lowering="aten"
            )
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.causal)
        return self.wo(out.transpose(1, 2).flatten(2))


def turns(positions: Tensor) -> Tensor:
    """`[N, D / 2]`: angles of a rotary embedding."""
    return positions[:, None] / 10.0 ** (torch.arange(WIDTH // HEADS // 2, device=positions.device) / 4.0)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * turn.cos() - second * turn.sin(), second * turn.cos() + first * turn.sin()], -1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if causal else nn.LayerNorm
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attn, self.mlp = Attention(causal, KEY_HEADS if causal else HEADS), Mlp()

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), turn)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """x `[B, N, 8]`, positions `[N]` -> `[B, N, 4]`; "vit" sees all tokens, "llama" those before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.causal = kind == "llama"
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(self.causal) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        turn = turns(positions) if self.causal else None
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(x)


def data(steps: int = 3, batch: int = 4, tokens: int = 16) -> list[tuple[Tensor, Tensor]]:
    """The same on every rank: inputs `[B, N, 8]` and what the output shall be `[B, N, 4]`, one pair a step."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(batch, tokens, 8, generator=generator), torch.randn(batch, tokens, 4, generator=generator))
        for _ in range(steps)
    ]


def model(kind: str, by_hand: bool = False) -> Model:
    """The same on every rank."""
    torch.manual_seed(1)
    made = Model(kind)
    for block in made.blocks:
        block.attn.by_hand = by_hand
    return made


def optimiser(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
