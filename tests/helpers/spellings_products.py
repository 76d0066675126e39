"""Spellings of the two products: how Q K^T and the product with V are written, and in which layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings import B, C, D, H, N, spelling
from torch import Tensor, nn

# ---- contraction -----------------------------------------------------------------------------------------------------


@spelling("fused", score="s")
def at(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@spelling("fused", score="s")
def torch_matmul(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.matmul(q, k.mT).softmax(-1), v)


@spelling("fused", score="s")
def method_matmul(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.matmul(k.permute(0, 1, 3, 2)).softmax(-1).matmul(v)


@spelling("fused", score="s")
def bmm_with_heads_in_the_batch(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B * H, N, D) for y in m.heads(x))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v).view(B, H, N, D)


@spelling("fused", score="0.5*s")
def baddbmm_of_nothing(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in m.heads(x))
    scores = torch.baddbmm(x.new_zeros(1, N, N), q, k.mT, beta=0, alpha=0.5)
    return (scores.softmax(-1) @ v).view(B, H, N, D)


@spelling("refused")
def baddbmm_of_a_bias_that_is_not_added(m: Any, x: Tensor) -> Tensor:
    """Its gradient is zeros, and there would be none."""
    q, k, v = (y.flatten(0, 1) for y in m.heads(x))
    return torch.baddbmm(m.p("bias", 1, N, N), q, k.mT, beta=0, alpha=0.5).softmax(-1) @ v


@spelling("fused", score="0.7*c0[0, i, j] + 0.5*s")
def baddbmm_of_a_bias(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in m.heads(x))
    return torch.baddbmm(m.p("bias", 1, N, N), q, k.mT, beta=0.7, alpha=0.5).softmax(-1) @ v


@spelling("fused", score="0.0 + 0.5*s")
def baddbmm_method(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return torch.zeros(1, 1, 1, dtype=q.dtype).baddbmm(q, k.mT, alpha=0.5).softmax(-1) @ v


@spelling("fused", score="s")
def einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


@spelling("fused", score="s")
def einsum_with_other_letters(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("xwzt,xwzu->xwtu", torch.einsum("xwtg,xwzg->xwzt", q, k).softmax(2), v)


@spelling("fused", score="s")
def einsum_with_tokens_before_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(B, N, 3, H, D).unbind(2)
    return torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1), v)


@spelling("fused", score="s")
def einsum_with_keys_first(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("jbhi,bhjd->dbhi", torch.einsum("bhjd,bhid->jbhi", k, q).softmax(0), v)


@spelling("fused", score="s")
def einsum_with_dots(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v)


@spelling("fused", score="s")
def einsum_without_arrow(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("ij,jk", torch.einsum("id,jd", q[0, 0], k[0, 0]).softmax(-1), v[0, 0])


@spelling("fused", score="s")
def linear_with_computed_weight(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(q[0, 0], k[0, 0]).softmax(-1), v[0, 0].t())


@spelling("fused", score="s")
def product_and_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


@spelling("fused", score="s")
def product_and_torch_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.sum(q[:, :, :, None] * k[:, :, None], dim=-1).softmax(-1)
    return torch.sum(weights[..., None] * v[:, :, None], dim=3)


@spelling("fused", score="s")
def without_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def without_batch(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[0, 0] @ k[0, 0].t()).softmax(1) @ v[0, 0]


# ---- layout ----------------------------------------------------------------------------------------------------------


@spelling("fused", score="s")
def scores_transposed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT).softmax(-2)).mT


@spelling("fused", score="s")
def softmax_of_transposed_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT).mT.softmax(-1) @ v


@spelling("fused", score="s")
def weights_transposed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ (q @ k.mT).softmax(-1).mT


@spelling("fused", score="s")
def keys_stored_transposed(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).mT.reshape(B, 3, H, D, N).unbind(1)
    return (q.mT @ k).softmax(-1) @ v.mT


@spelling("fused", score="s")
def convolution_maps(m: Any, x: Tensor) -> Tensor:
    """Feature maps [B, C, H, W] as in BoTNet: v @ attn^T."""
    qkv = m.layer("conv", lambda: nn.Conv2d(C, 3 * C, 1))
    image = x.mT.reshape(B, C, 1, N)
    q, k, v = qkv(image).chunk(3, dim=1)
    q, k, v = (y.reshape(B, H, D, N) for y in (q, k, v))
    return (v @ (q.mT @ k).softmax(-1).mT).reshape(B, C, 1, N)


@spelling("fused", score="s")
def heads_last(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(B, N, 3, D, H).permute(2, 0, 4, 1, 3).unbind(0)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", traceable=False)
def batch_second(m: Any, x: Tensor) -> Tensor:
    """[N, B, C], as nn.MultiheadAttention has it inside."""
    q, k, v = (y.contiguous().view(N, B * H, D).transpose(0, 1) for y in m.qkv(x.transpose(0, 1)).chunk(3, -1))
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return out.transpose(0, 1).contiguous().view(N, B, C)


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, 4, 6, C),))
def windows(m: Any, x: Tensor) -> Tensor:
    """Window partition: [B, 2*2, 2*3, C] -> [B*4, 6, C]."""
    parts = x.view(B, 2, 2, 2, 3, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, C)
    q, k, v = m.qkv(parts).reshape(-1, 6, 3, H, D).permute(2, 0, 3, 1, 4)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def windows_as_an_axis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack([y, y.flip(-1)], 2) for y in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, 4, 6, C),))
def grid(m: Any, x: Tensor) -> Tensor:
    """Grid attention (MaxViT): the tokens of a window stand apart; two token axes merged after the projection."""
    q, k, v = m.qkv(x).view(B, 2, 2, 3, 2, 3, H, D).permute(5, 0, 2, 4, 6, 1, 3, 7).flatten(5, 6).unbind(0)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def two_token_axes(m: Any, x: Tensor) -> Tensor:
    """Queries keep their two axes (rows, columns) in the product: [B, H, y, x, keys]."""
    q, k, v = m.heads(torch.cat([x, x[:, :1]], 1))
    q = q.reshape(B, H, 2, 3, D)
    scores = torch.einsum("bhyxd,bhjd->bhyxj", q, k)
    return torch.einsum("bhyxj,bhjd->bhyxd", scores.softmax(-1), v)


@spelling("fused", score="s")
def axial(m: Any, x: Tensor) -> Tensor:
    """Attention along one of two token axes."""
    y = torch.stack([x, x * 0.5, x - 1], 1)
    q, k, v = m.qkv(y).view(B, 3, N, 3, H, D).permute(3, 0, 4, 1, 2, 5)
    return torch.einsum("bhynm,bhymd->bhynd", torch.einsum("bhynd,bhymd->bhynm", q, k).softmax(-1), v)


@spelling("fused", score="s")
def axial_down(m: Any, x: Tensor) -> Tensor:
    y = torch.stack([x, x * 0.5, x - 1], 1)
    q, k, v = m.qkv(y).view(B, 3, N, 3, H, D).permute(3, 0, 4, 1, 2, 5)
    return torch.einsum("bhyzn,bhznd->bhynd", torch.einsum("bhynd,bhznd->bhyzn", q, k).softmax(3), v)


# ---- queries, keys and values that are not the same tokens -----------------------------------------------------------


@spelling("fused", score="s")
def single_query(m: Any, x: Tensor) -> Tensor:
    """Class attention (CaiT): one query, all keys."""
    q, k, v = m.heads(x)
    return (q[:, :, :1] @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def single_query_without_its_axis(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhn,bhnd->bhd", torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k).softmax(-1), v)


@spelling("fused", score="s", inputs=lambda: (torch.randn(3, N, B, C),))
def tied_rows(m: Any, x: Tensor) -> Tensor:
    """ESM's MSA transformer: one map for all rows of an alignment, summed over rows and features."""
    q, k, v = (m.layer(name, lambda: nn.Linear(C, C))(x).unflatten(-1, (H, D)) for name in "qkv")
    return torch.einsum("hbij,rjbhd->ribhd", torch.einsum("ribhd,rjbhd->hbij", q, k).softmax(-1), v)


@spelling("fused", score="s")
def learned_query(m: Any, x: Tensor) -> Tensor:
    """Attention pooling: the query is a parameter, keys and values are tokens."""
    _, k, v = m.heads(x)
    return (m.p("latent", 1, H, 1, D).expand(B, -1, -1, -1) @ k.mT).softmax(-1) @ v


@spelling("fused", score="0.5*s")
def learned_queries(m: Any, x: Tensor) -> Tensor:
    """Patch merger, attention residuals: a parameter times the tokens, with no axis of the batch."""
    return (m.p("latent", 2, C) @ x.mT * 0.5).softmax(-1) @ x


@spelling("fused", score="s")
def learned_queries_by_einsum(m: Any, x: Tensor) -> Tensor:
    _, k, v = m.heads(x)
    weights = torch.einsum("bhnd,hsd->bhsn", k, m.p("latent", H, 2, D)).softmax(-1)
    return torch.einsum("bhsn,bhnd->bshd", weights, v)


@spelling("fused", score="s")
def attention_between_layers(m: Any, x: Tensor) -> Tensor:
    """Attention residuals over depth: each token attends to what earlier layers made of it."""
    history = torch.stack([x, torch.sin(x), torch.cos(x)])
    weights = torch.einsum("lbnd,sd->slbn", history, m.p("latent", 2, C)).softmax(1)
    return torch.einsum("slbn,lbnd->sbnd", weights, history)


@spelling("fused", score="1.0*s")
def projected_learned_query(m: Any, x: Tensor) -> Tensor:
    _, k, v = m.heads(x)
    q = m.layer("q", lambda: nn.Linear(C, C))(m.p("latent", 1, 2, C)).view(1, 2, H, D).transpose(1, 2)
    return F.scaled_dot_product_attention(q.expand(B, -1, -1, -1), k, v, scale=1.0)


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, N, C), torch.randn(B, 7, C)))
def cross_attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    q, _, _ = m.heads(x)
    _, k, v = m.heads(y)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, 16, C),))
def pooled_keys(m: Any, x: Tensor) -> Tensor:
    """PVT: keys and values from a strided convolution over the tokens."""
    reduce, kv = m.layer("sr", lambda: nn.Conv2d(C, C, 2, 2)), m.layer("kv", lambda: nn.Linear(C, 2 * C))
    q, _, _ = m.heads(x)
    small = reduce(x.mT.reshape(B, C, 4, 4)).reshape(B, C, -1).mT
    k, v = kv(small).reshape(B, -1, 2, H, D).permute(2, 0, 3, 1, 4)
    return (q @ k.mT).softmax(-1) @ v


def _maps(x: Tensor) -> Tensor:
    return x.reshape(B * H, 4, 4, D).permute(0, 3, 1, 2)


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, 16, C),))
def max_pooled_keys(m: Any, x: Tensor) -> Tensor:
    """MViT: heads are folded into the batch for the pooling, and a class token is kept aside."""
    q, k, v = m.heads(x)
    k, v = (torch.cat([y[:, :, :1], F.max_pool2d(_maps(y), 2).flatten(2).mT.view(B, H, 4, D)], 2) for y in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, C, 6, 6),))
def halo_keys(m: Any, x: Tensor) -> Tensor:
    """HaloNet: each 3x3 block attends to the 5x5 around it, cut out by `unfold`."""
    q = m.layer("q", lambda: nn.Conv2d(C, C, 1))(x)
    kv = m.layer("kv", lambda: nn.Conv2d(C, 2 * C, 1))(x)
    q = q.reshape(B * H, D, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(B * H, 4, 9, D)
    kv = F.pad(kv, [1, 1, 1, 1]).unfold(2, 5, 3).unfold(3, 5, 3).reshape(B * H, 2 * D, 4, -1).permute(0, 2, 3, 1)
    k, v = kv.split([D, D], dim=-1)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", inputs=lambda: (torch.randn(B, N, C), torch.randn(B, H, 4, D), torch.randn(B, H, 4, D)))
def cached_keys(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return (q @ k.mT).softmax(-1) @ v


@spelling(
    "fused", score="s", inputs=lambda: (torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, 7))
)
def wider_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def keys_are_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ k


@spelling("fused", score="s")
def queries_are_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-local block, embedded the same way."""
    return (q @ q.mT).softmax(-1) @ v


# ---- fewer key heads -------------------------------------------------------------------------------------------------


def grouped() -> tuple[Tensor, ...]:
    return torch.randn(B, 2 * H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)


@spelling("fused", score="s", inputs=grouped)
def heads_by_repeat_interleave(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), torch.repeat_interleave(v, 2, dim=1)
    return (q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s", inputs=grouped)
def heads_by_expand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' repeat_kv."""
    k, v = (y[:, :, None].expand(B, H, 2, N, D).reshape(B, 2 * H, N, D) for y in (k, v))
    return (q @ k.transpose(2, 3)).softmax(-1) @ v


@spelling("fused", score="s", inputs=grouped)
def heads_by_broadcast(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.view(B, H, 2, N, D) @ k.unsqueeze(2).mT).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


@spelling("fused", score="s", inputs=grouped)
def heads_by_einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, H, 2, N, D)
    return torch.einsum("bhgij,bhje->bhgie", torch.einsum("bhgid,bhjd->bhgij", q, k).softmax(-1), v)


@spelling("fused", score="0.5*s", inputs=grouped)
def heads_by_sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@spelling("fused", score="s")
def single_key_head(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention."""
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


@spelling("fused", score="s")
def repeated_batch(m: Any, x: Tensor) -> Tensor:
    """Keys shared by two query groups that are folded into the batch (CrossViT, DETR-like decoders)."""
    q, k, v = m.heads(x)
    q = torch.cat([q, q * 0.5], 0)
    k, v = k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)
    return (q @ k.mT).softmax(-1) @ v


# ---- torch's own -----------------------------------------------------------------------------------------------------


@spelling("fused", score="0.5*s")
def sdpa(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling("fused", score="where(le(j, i), 0.3*s, -oo)")
def sdpa_causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@spelling("fused", score="0.5*s + c0[0, h, 0, j]")
def sdpa_float_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.p("mask", 1, H, 1, N))


@spelling("fused", score="where(c0[i, j], 0.5*s, -oo)")
def sdpa_bool_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, m.b("mask", lambda: torch.ones(N, N).tril().bool()), 0.0)


@spelling("fused", score="0.5*s")
def sdpa_three_dimensional(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))


@spelling("fused", score=None, traceable=False)
def multihead_attention(m: Any, x: Tensor) -> Any:
    """Weights are not asked for: fused."""
    return m.layer("mha", lambda: nn.MultiheadAttention(C, H, batch_first=True))(x, x, x, need_weights=False)[0]


@spelling("scores-kept", reason="read by", traceable=False)
def multihead_attention_with_weights(m: Any, x: Tensor) -> Any:
    return m.layer("mha", lambda: nn.MultiheadAttention(C, H, batch_first=True))(x, x, x, average_attn_weights=False)


@spelling("fused", "fused", score=None)
def two_layers(m: Any, x: Tensor) -> Tensor:
    """The second attention's queries, keys and values come from the first."""
    for _ in range(2):
        q, k, v = m.heads(x)
        x = x + m.merge((q @ k.mT * D**-0.5).softmax(-1) @ v)
    return x


@spelling("fused", "fused", score=None)
def one_attends_to_the_other(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inner = (q @ k.mT).softmax(-1) @ v
    return (inner @ k.mT).softmax(-1) @ inner
