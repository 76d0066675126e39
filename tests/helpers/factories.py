"""Tiny models for `kvt explain tests/helpers/factories.py:NAME`, good ones and ones that go wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(q kT / sqrt(D) [+ bias]) v on [B, N, C]."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        if bias is not None:
            scores = scores + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x, bias)
        return self.head(x.mean(1)).softmax(-1)


def stack() -> tuple[nn.Module, tuple[Tensor]]:
    """Two attentions, and a classifier's softmax that is none."""
    return Stack(), (torch.randn(2, 10, 16),)


def stack_with_bias() -> tuple[nn.Module, tuple[Tensor], dict[str, Tensor]]:
    return Stack(), (torch.randn(2, 10, 16),), {"bias": torch.randn(2, 10, 10)}


class TwoSizes(nn.Module):
    """Heads of 8 features, and of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = Attention(), Attention(width=16, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(self.small(x))


def two_sizes() -> tuple[nn.Module, tuple[Tensor]]:
    return TwoSizes(), (torch.randn(2, 10, 16),)


def chatty() -> tuple[nn.Module, tuple[Tensor]]:
    print("building, building")
    return stack()


def many() -> tuple[nn.Module, tuple[Tensor]]:
    """The same with inputs enough to calibrate on."""
    return Stack(), (torch.randn(24, 10, 16),)


def tiny_images() -> tuple[nn.Module, tuple[Tensor]]:
    """Attention on pictures of 8 by 8."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.attention = nn.Conv2d(3, 16, 2, 2), Attention()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.attention(self.patches(pixels).flatten(2).transpose(1, 2)).mean(1)

    return Images(), (torch.randn(2, 3, 8, 8),)


def raising() -> None:
    raise ValueError("no such thing\nas a second line")


def only_a_model() -> nn.Module:
    return Stack()


def failing_model() -> tuple[nn.Module, tuple[Tensor]]:
    return Stack(), (torch.randn(2, 10, 15),)


not_a_function = 3


def vision() -> tuple[nn.Module, tuple[Tensor]]:
    """A vision transformer of two layers on 64 x 64 images: CLS and 4 x 4 patches."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3), (torch.randn(2, 3, 64, 64),)
