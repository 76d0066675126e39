"""k-NN attention written into a model of your own: `topk_attention` instead of `scaled_dot_product_attention`.

python examples/op_in_a_model.py
"""

import torch
from torch import Tensor, nn

import kvt_compile


class Attention(nn.Module):
    """[B, N, C] -> [B, N, C]; every query looks at its `topk` best keys, with a learned bias for each head."""

    def __init__(self, width: int, heads: int, tokens: int, topk: int | float) -> None:
        super().__init__()
        self.heads, self.topk = heads, topk
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = kvt_compile.topk_attention(q, k, v, topk=self.topk, attn_mask=self.bias)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, width))


def by_hand(module: Attention, x: Tensor) -> Tensor:
    """The same with everything written out: three N x N tensors for each head."""
    batch, tokens, width = x.shape
    q, k, v = module.qkv(x).reshape(batch, tokens, 3, module.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + module.bias
    kth = scores.topk(module.topk, dim=-1).values[..., -1:]
    weights = scores.masked_fill(scores < kth, -torch.inf).softmax(dim=-1)
    return module.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def main() -> None:
    torch.manual_seed(0)
    module = Attention(width=64, heads=4, tokens=50, topk=10)
    x = torch.randn(2, 50, 64)
    difference = (module(x) - by_hand(module, x)).abs().max().item()
    print(f"against the same by hand: {difference:.1e}")
    assert difference < 1e-5

    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (module(x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"20 steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}; the bias is trained too: {module.bias.abs().max():.3f}")
    assert losses[-1] < losses[0]
    assert module.bias.abs().max() > 0


if __name__ == "__main__":
    main()
