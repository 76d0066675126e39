"""Small networks with attention in them, for the tests of several rooms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from factories import Stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Residual attention with a learned bias per head and key parity, so that captured tensors have gradients."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.drop = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, topk: int | None = None) -> Tensor:
        q, k, v = self.project(x)
        scores = q * 8**-0.5 @ k.transpose(-2, -1) * self.gain
        if topk is not None:  # the official k-NN attention, by hand
            scores = scores.masked_fill(scores < scores.topk(topk, -1).values[..., -1:], -torch.inf)
        weights = self.drop(scores.softmax(-1))
        return x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = Block(dropout), Block(dropout)
        self.around = around or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.second, self.around(self.first, x))

    def by_hand(self, x: Tensor, topk: int) -> Tensor:
        return self.second(self.first(x, topk), topk)


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 2e-6) -> None:
    scale = max(float(x.abs().max()) for x in expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=rtol * scale)


class Classifier(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1).softmax(-1)


class Branching(nn.Module):
    """Control flow that symbolic_trace cannot follow; on sizes, which torch.export can, or on data, which it cannot."""

    def __init__(self, on_data: bool) -> None:
        super().__init__()
        self.net, self.on_data = Net(), on_data

    def forward(self, x: Tensor) -> Tensor:
        even = bool(x.sum() > 0) if self.on_data else x.shape[1] % 2 == 0
        return self.net(x) if even else self.net(-x)


class TalkingHeads(nn.Module):
    """Mixes heads between the product and the softmax, so that only the scores-kept tier fits."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Checkpointed(Stack):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, bias, use_reentrant=False)
        return x
