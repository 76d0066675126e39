"""Small models of attention mechanisms that do more than select, written from their definitions.

GatedAttention      a sigmoid gate on the output, of the queries' own layer; grouped keys, norms, RoPE (Qwen3)
MixtureOfHeads      every head's output times a routed gate of the token (MoH-ViT)
NormedHeads         the heads with the largest query norm, others give zero (MoH-LLaMA, no parameters)
VariedWindows       keys and values sampled between the tokens of a window that moves and grows (VSA)
LinearAndWindows    window attention, then linear attention with ReLU and a floor (L2ViT)
CoreContext         groups pooled by their last query, seen beside the near tokens (CCA), one softmax over both
TalkingHeads        heads mixed before and after the softmax
DifferentialHeads   the difference of two maps (Differential Transformer); *Outputs: of two outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projected(nn.Module):
    """q, k, v [B, H, N, D] of one layer, and the layer behind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.scale = self.size**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]

    def joined(self, out: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, C]."""
        found: Tensor = self.proj(out.flatten(2))
        return found


class GatedAttention(nn.Module):
    """The gate: one number per head and token, or one per feature."""

    def __init__(self, width: int = 24, heads: int = 4, groups: int = 2, size: int = 6, wide: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.each = heads, groups, size, heads // groups
        self.gates = self.each * (size if wide else 1)
        self.q_proj = nn.Linear(width, groups * (self.each * size + self.gates))
        self.k_proj, self.v_proj = nn.Linear(width, groups * size), nn.Linear(width, groups * size)
        self.q_norm, self.k_norm, self.o_proj = nn.RMSNorm(size), nn.RMSNorm(size), nn.Linear(heads * size, width)

    def turned(self, x: Tensor) -> Tensor:
        half = self.size // 2
        rates = 10000.0 ** -(torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * rates
        cos, sin = (torch.cat((f(angles), f(angles)), -1).to(x.dtype) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def repeated(self, x: Tensor) -> Tensor:
        batch, groups, tokens, size = x.shape
        return x[:, :, None].expand(batch, groups, self.each, tokens, size).reshape(batch, self.heads, tokens, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, gate = self.q_proj(x).view(batch, tokens, self.groups, -1).split([self.each * self.size, self.gates], -1)
        q = self.turned(self.q_norm(q.reshape(batch, tokens, self.heads, self.size)).transpose(1, 2))
        k = self.k_norm(self.k_proj(x).view(batch, tokens, self.groups, self.size)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.groups, self.size).transpose(1, 2)
        scores = q @ self.repeated(self.turned(k)).transpose(2, 3) * self.size**-0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1)
        out = (weights @ self.repeated(v)).transpose(1, 2) * torch.sigmoid(gate.reshape(batch, tokens, self.heads, -1))
        found: Tensor = self.o_proj(out.flatten(2))
        return found


class MixtureOfHeads(Projected):
    """The first heads are shared; of the rest the gate of a token takes `top`."""

    def __init__(self, width: int = 24, heads: int = 6, shared: int = 2, top: int = 2) -> None:
        super().__init__(width, heads)
        self.shared, self.top = shared, top
        self.wg, self.w1 = nn.Linear(width, heads - shared, bias=False), nn.Linear(width, shared, bias=False)
        self.w0 = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        q, k, v = self.split(x)
        out = (((q * self.scale) @ k.mT).softmax(-1) @ v).transpose(1, 2)
        flat = x.reshape(-1, width)
        gates = self.wg(flat).softmax(1)
        mask = F.one_hot(gates.topk(self.top, dim=1).indices, self.heads - self.shared).sum(1)
        balance = (gates.mean(0) * mask.to(x.dtype).mean(0)).mean() * (self.heads - self.shared) ** 2
        gates = gates * mask
        gates = gates / gates.sum(1, keepdim=True).clamp(min=1e-9) * self.top
        shares = self.w0(flat).softmax(1) * 2
        every = torch.cat([shares[:, :1] * self.w1(flat).softmax(1) * self.shared, shares[:, 1:] * gates], 1)
        return self.joined(out * every.reshape(batch, tokens, self.heads, 1)), balance


class NormedHeads(Projected):
    def __init__(self, width: int = 24, heads: int = 6, shared: int = 2, top: int = 2) -> None:
        super().__init__(width, heads)
        self.shared, self.top = shared, top

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        norms = q.norm(dim=-1)[:, self.shared :]
        gates = (norms / norms.std(1, keepdim=True)).softmax(1).transpose(1, 2)
        mask = torch.zeros_like(gates).scatter(-1, gates.topk(self.top).indices, 1.0)
        mask = torch.cat([torch.ones_like(mask[..., : self.shared]), mask], -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.joined(out.transpose(1, 2) * mask.unsqueeze(-1))


class VariedWindows(nn.Module):
    """[B, C, H, W]; H and W multiples of the window."""

    def __init__(self, width: int = 16, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.window = heads, width // heads, window
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.offset, self.growth = (
            nn.Sequential(nn.AvgPool2d(window), nn.LeakyReLU(), nn.Conv2d(width, 2 * heads, 1)) for _ in range(2)
        )
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        cells = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = cells[:, :, None] - cells[:, None] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def places(self, x: Tensor, down: int, across: int) -> Tensor:
        """Where keys are sampled, [B*heads, H, W, 2]."""
        batch, w = x.shape[0], self.window
        offset = self.offset(x).reshape(batch * self.heads, 2, down, across)
        growth = self.growth(x).reshape(batch * self.heads, 2, down, across)
        steps = [torch.arange(n, dtype=x.dtype, device=x.device) for n in (across, down, w)]
        middle = torch.stack(
            torch.meshgrid((steps[0] * 2 + 1) / across - 1, (steps[1] * 2 + 1) / down - 1, indexing="xy")
        )
        inside = (steps[2] * 2 + 1 - w) / w
        base = torch.stack(torch.meshgrid(inside / across, inside / down, indexing="xy"))
        moved = base[None, :, None, :, None, :] * (1 + growth[:, :, :, None, :, None]) + offset[:, :, :, None, :, None]
        grid = middle[None, :, :, None, :, None] + moved
        return grid.reshape(batch * self.heads, 2, down * w, across * w).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        w, down, across = self.window, height // self.window, length // self.window
        qkv = self.qkv(x).reshape(batch, 3, self.heads, self.size, height, length).transpose(0, 1)
        qkv = qkv.reshape(3, batch * self.heads, self.size, height, length)
        grid = self.places(x, down, across)
        q, k, v = (
            t.reshape(batch, self.heads, self.size, down, w, across, w)
            .permute(0, 3, 5, 1, 4, 6, 2)
            .reshape(batch * down * across, self.heads, w * w, self.size)
            for t in (qkv[0], *(F.grid_sample(t, grid, align_corners=True) for t in (qkv[1], qkv[2])))
        )
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        out = (((q * self.size**-0.5) @ k.mT) + bias[None]).softmax(-1) @ v
        out = out.reshape(batch, down, across, self.heads, w, w, self.size).permute(0, 3, 6, 1, 4, 2, 5)
        found: Tensor = self.proj(out.reshape(batch, width, height, length))
        return found


class Windows(Projected):
    """[B, H, W, C]; what fills the last windows is not masked."""

    window = 4

    def forward(self, x: Tensor) -> Tensor:
        batch, height, length, width = x.shape
        w = self.window
        x = F.pad(x, (0, 0, 0, -length % w, 0, -height % w))
        down, across = x.shape[1] // w, x.shape[2] // w
        x = x.view(batch, down, w, across, w, width).transpose(2, 3).reshape(-1, w * w, width)
        q, k, v = self.split(x)
        out = self.joined((((q * self.scale) @ k.mT).softmax(-1) @ v).transpose(1, 2))
        out = out.view(batch, down, across, w, w, width).transpose(2, 3).reshape(batch, down * w, across * w, width)
        return out[:, :height, :length]


class Linear(Projected):
    """relu(q) (relu(k)T v) over max(relu(q) . sum relu(k), 100), in two products as big as the features."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.t = nn.Parameter(torch.full((heads, 1, 1), self.scale))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = q.relu(), k.relu()
        total = (q @ k.sum(-2, keepdim=True).mT).clamp(min=100)
        return self.joined((q @ (k.mT @ v) * self.t / total).transpose(1, 2))


class LinearAndWindows(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.cpe = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.windows, self.linear = Windows(width, heads), Linear(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.cpe(x)).permute(0, 2, 3, 1)
        x = x + self.windows(self.norm1(x))
        x = x.flatten(1, 2)
        found: Tensor = x + self.linear(self.norm2(x))
        return found


class CoreContext(Projected):
    """Groups of p tokens become one key and one value each; a query sees those that lie w back, and all nearer ones."""

    def __init__(self, width: int = 16, heads: int = 2, p: int = 4, w: int = 4) -> None:
        super().__init__(width, heads)
        self.p, self.w = p, w

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        p, w, many = self.p, self.w, (x.shape[1] - self.w) // self.p
        q, k, v = self.split(x)
        last, keys, values = (t[:, :, : many * p].reshape(batch, self.heads, many, p, self.size) for t in (q, k, v))
        pooling = ((last[..., -1:, :] * keys).sum(-1) * self.scale).softmax(-1).unsqueeze(-1)
        core_k, core_v = (pooling * keys).sum(-2), (pooling * values).sum(-2)
        row = torch.arange(1, tokens + 1, device=x.device)[:, None]
        far = (row > w) & (torch.arange(1, many + 1, device=x.device) <= (row - w) // p)
        column = torch.arange(1, tokens + 1, device=x.device)
        near = (column >= torch.where(row > w, row - w - (row - w) % p + 1, 1)) & (column <= row)
        mask = torch.cat([far, near], -1)
        k, v = torch.cat([core_k, k], 2), torch.cat([core_v, v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.joined(out.transpose(1, 2))


class TalkingHeads(Projected):
    """before, after: where heads are mixed."""

    def __init__(self, width: int = 16, heads: int = 4, before: bool = True, after: bool = True) -> None:
        super().__init__(width, heads)
        self.before = nn.Linear(heads, heads) if before else nn.Identity()
        self.after = nn.Linear(heads, heads) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = (q * self.scale) @ k.mT
        weights = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        weights = self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.joined((weights @ v).transpose(1, 2))


class DifferentialHeads(Projected):
    """softmax(q1 k1T) - lambda softmax(q2 k2T), times v twice as wide, a norm of each head."""

    def __init__(self, width: int = 16, heads: int = 2, start: float = 0.8) -> None:
        super().__init__(width, heads)
        self.half, self.start = self.size // 2, start
        self.lambdas = nn.Parameter(torch.randn(4, self.half) * 0.1)
        self.norm = nn.RMSNorm(self.size)

    def share(self) -> Tensor:
        first, second = (self.lambdas[0] * self.lambdas[1]).sum(), (self.lambdas[2] * self.lambdas[3]).sum()
        return first.exp() - second.exp() + self.start

    def combined(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        q, k = (t.unflatten(-1, (2, self.half)).transpose(2, 3).flatten(1, 2) for t in (q, k))
        scores = torch.nan_to_num(q @ k.mT * self.half**-0.5)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        maps = scores.masked_fill(hidden, -torch.inf).softmax(-1).unflatten(1, (self.heads, 2))
        return (maps[:, :, 0] - self.share() * maps[:, :, 1]) @ v

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.combined(*self.split(x))) * (1 - self.start)
        return self.joined(out.transpose(1, 2))


class DifferentialOutputs(DifferentialHeads):
    def combined(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (
            F.scaled_dot_product_attention(q.chunk(2, -1)[n], k.chunk(2, -1)[n], v, is_causal=True) for n in (0, 1)
        )
        return first - self.share() * second
