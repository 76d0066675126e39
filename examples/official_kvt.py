"""A model that selects keys by itself: KVT's own attention (arXiv 2106.00515), written anew from its definition.

    t = scale * q kT;  index = topk(t, k)[1];  mask = 0/1 by scatter;  t = where(mask > 0, t, -inf);  softmax;  @ v

It is recognised, and fused with its own k: the same outputs and gradients, and no matrix of tokens x tokens.

python examples/official_kvt.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kvt_compile


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


def main(size: int = 64, patch: int = 8, depth: int = 2) -> None:
    torch.manual_seed(0)
    model = KVT(size, patch, dim=64, heads=4, depth=depth, topk=20, classes=10).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)

    print(kvt_compile.explain(model, images))  # ... own k = 20
    result = kvt_compile.rewrite(model, images)  # no topk: the model has chosen
    assert [(site.outcome, site.topk, site.own_k) for site in result.report.sites] == [("fused", 20, "20")] * depth

    parameters = list(model.parameters())
    before, after = model(images), result.module(images)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(before.square().sum(), parameters)
    fused = torch.autograd.grad(after.square().sum(), list(result.module.parameters()))
    for mine, theirs in zip(fused, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    print(f"outputs and the gradients of {len(parameters)} parameters are the model's own")
    print(f"kept for the backward: {kept_for_backward(model, images) >> 10} KiB before, "
          f"{kept_for_backward(result.module, images) >> 10} KiB after")  # fmt: skip


def kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes of all tensors that autograd keeps of a forward, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(images)
    del out
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in known)


if __name__ == "__main__":
    main()
