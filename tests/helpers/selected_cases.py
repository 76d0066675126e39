"""Cases of attention under a selection, for every lowering."""

from __future__ import annotations

import torch
from oracles import Case, floats
from torch import Tensor
from torch.nn import functional as F

import kvt_compile

GRID, PREFIX = (5, 7), 2
TOKENS = 37
CASE = Case("selected", queries=TOKENS, keys=TOKENS, heads=4, kv_heads=2, topk=TOKENS, grid=GRID, prefix=PREFIX)
SELECTIONS = [
    "window(3) | prefix",
    "window((3, 4), dilation=(1, 2), stride=(2, 1)) | sinks(4)",
    "window(4, causal=(True, False)) | prefix",
    "halo(2, 1) | prefix",
    "regions(3, (2, 3)) | prefix",
    "regions(0.3, (2, 3), heads=all) | sinks(3)",
    "shifted(3) | prefix",
    "prefix(3) | window(2) & halo(3, 1)",
    "keys(5)",
    "keys(0.2, by=mean_query) & (window(3) | prefix)",
    "heads(2) | window((3, 4), dilation=(1, 2)) | prefix",
    "regions(0.2, (2, 3)) | halo(2, 1) | keys(3) | prefix",
    "heads(1) & (shifted(3) | sinks(2)) | prefix",
]
CASES = [
    *(CASE.but(id=text, select=text) for text in SELECTIONS),
    CASE.but(id="ranked", select="window(4) | prefix", topk=5),
    CASE.but(id="by mass", select="(window(4) | prefix) & mass(0.6)"),
    CASE.but(id="first of ties", select="topk(1.0, ties=lowest)", topk=7, grid=None, prefix=0),
    CASE.but(id="ranked within what is chosen", select="heads(2) & keys(9) | sinks(3)", topk=4, dropout_p=0.3),
    CASE.but(id="chosen beside a bias with a gradient", select="keys(4) | window(3) | prefix",
             score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys")),
    CASE.but(id="bias with a gradient", select="window(3) | prefix", score="0.35*s + c0[h, i, j]",
             captured=floats("heads", "queries", "keys")),
    CASE.but(id="a mask besides, and a gate", select="window(3) | prefix", score="where(le(j, i), 0.35*s*c0[j], -oo)",
             captured=floats("queries"), weight="p*c0[i]"),
    CASE.but(id="dropout", select="halo(2, 1) | prefix", dropout_p=0.3),
    CASE.but(id="no row keeps a key", select="sinks(2) & window(2)", grid=(TOKENS,), prefix=0),
    CASE.but(id="bfloat16", select="window(3) | prefix", dtype=torch.bfloat16),
    CASE.but(id="float64", select="window(3) | prefix", dtype=torch.float64),
    CASE.but(id="heads that choose together", select="regions(0.3, 4, heads=all)", grid=(TOKENS,), prefix=0),
    CASE.but(id="more queries than a tile", select="window(3) | prefix", grid=(9, 11), prefix=1, queries=100, keys=100,
             topk=100),
    CASE.but(id="other keys than queries", select="sinks(5)", queries=11, grid=None, prefix=0),
]  # fmt: skip


def qkv(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, 4, tokens, 8, dtype=dtype, requires_grad=True) for _ in range(3))  # type: ignore[return-value]


def assert_dense(text: str) -> None:
    """A selection that keeps every key is dense attention: output and gradients, the bias's too."""
    q, k, v = qkv()
    bias = torch.randn(4, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    mine = kvt_compile.attention(q, k, v, select=text, grid=GRID, prefix=PREFIX, attn_mask=bias)
    dense = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(mine, dense)
    weight = torch.randn_like(dense)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v, bias), weight) for x in (mine, dense)), strict=True):
        torch.testing.assert_close(one, other)
