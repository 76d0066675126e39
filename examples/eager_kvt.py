"""k-NN attention as its authors wrote it, in eager code: what the demo and the benchmarks compare against.

    attn = softmax(where(topk(q kT * scale), q kT * scale, -inf)) v        (arXiv 2106.00515, section 3.2)

It sorts every row and keeps three N x N tensors per head: the cost that `backend="kvt"` removes.
"""

import math
import types

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn


def eager_kvt(q: Tensor, k: Tensor, v: Tensor, scale: float, ratio: float) -> Tensor:
    """q, k [B, H, N, D], v [B, H, N, Dv] -> [B, H, N, Dv]; every query keeps its ceil(ratio * N) best keys."""
    scores = (q @ k.transpose(-2, -1)) * scale
    best = torch.topk(scores, math.ceil(ratio * k.shape[-2]), dim=-1).indices
    mask = torch.zeros_like(scores).scatter_(-1, best, 1.0)
    scores = torch.where(mask > 0, scores, torch.full_like(scores, float("-inf")))
    return scores.softmax(dim=-1) @ v


def patch(model: nn.Module, ratio: float) -> nn.Module:
    """Gives every attention of a timm ViT the eager algorithm, in place: the fork that users make by hand today."""

    def forward(self: Attention, x: Tensor, *_: object, **__: object) -> Tensor:
        batch, tokens, _width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = eager_kvt(self.q_norm(q), self.k_norm(k), v, self.scale, ratio)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).reshape(batch, tokens, -1))))

    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = types.MethodType(forward, module)
    return model
