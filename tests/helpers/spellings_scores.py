"""Spellings of what stands between Q K^T and the softmax: scales, biases, masks; and of the softmax itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings import CLAMP, B, C, D, H, Hand, N, spelling
from torch import Tensor, nn

# ---- scale -----------------------------------------------------------------------------------------------------------


@spelling("fused", score="0.5*s")
def scale_on_q(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * D**-0.5) @ k.mT).softmax(-1) @ v


@spelling("fused", score="0.125*s")
def scale_on_both(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.5) @ (k / 2.0).mT / 2).softmax(-1) @ v


@spelling("fused", score="0.5*s")
def scale_after(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * (q @ k.mT)).softmax(-1) @ v


@spelling("fused", score="0.5*s")
def scale_by_division(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.div(q @ k.mT, 2).softmax(-1) @ v


@spelling("fused")
def scale_by_the_root_of_the_width(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@spelling("fused")
def scale_as_a_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(D, dtype=q.dtype))).softmax(-1) @ v


@spelling("fused", score="s*c0")
def scale_learned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * m.p("scale")).softmax(-1) @ v


@spelling("fused", score="s*c0[h, 0, 0]")
def scale_learned_for_each_head(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * m.p("scale", H, 1, 1)).softmax(-1) @ v


@spelling("fused", score="s*c1 + c0[i, j, h]")
def scale_learned_on_q_with_a_bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A captured scale on the queries and a captured bias: two tensors that must not be mixed up."""
    table = m.p("table", 9, H)[m.b("index", lambda: torch.arange(N)[:, None] - torch.arange(N) + 4)]
    return ((q * m.p("scale")) @ k.mT + table.permute(2, 0, 1)).softmax(-1) @ v


@spelling("fused", score="s*c2*c3*c0 + c1[j]")
def scale_learned_on_both_sides(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * m.p("one")) @ (k * m.p("two")).mT * m.p("three") + m.p("bias", N)
    return scores.softmax(-1) @ v


@spelling("fused", score="s*c0[h, 0, 0]")
def cosine(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin v2."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores * torch.clamp(m.p("logit_scale", H, 1, 1), max=0.5).exp()).softmax(-1) @ v


@spelling("fused")
def cosine_by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    return (q @ k.mT * 10).softmax(-1) @ v


@spelling("fused", score="0.5*s")
def normalised_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    norm = m.layer("norm", lambda: nn.LayerNorm(D))
    return (norm(q) @ norm(k).mT * 0.5).softmax(-1) @ v


@spelling("fused", score="0.5*s")
def rotary(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turned(y: Tensor) -> Tensor:
        half = torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1)
        return y * m.b("cos", lambda: torch.randn(N, D)) + half * m.b("sin", lambda: torch.randn(N, D))

    return (turned(q) @ turned(k).mT * 0.5).softmax(-1) @ v


# ---- bias ------------------------------------------------------------------------------------------------------------


@spelling("fused", score="s + c0[h, i, j]")
def bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + m.p("bias", H, N, N)).softmax(-1) @ v


@spelling("fused", score="s - c0[0, h, 0, j]")
def bias_subtracted(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sub(q @ k.mT, m.p("bias", 1, H, 1, N)).softmax(-1) @ v


@spelling("fused", score="0.5*s + c0[h, i, j]")
def bias_from_a_table(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: a table gathered by an index buffer."""
    index = m.b("index", lambda: torch.randint(0, 9, (N, N)))
    table = m.p("table", 9, H)[index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
    return (q * 0.5 @ k.mT + table.unsqueeze(0)).softmax(-1) @ v


@spelling(
    "fused",
    score="0.5*s + c0[h, i, j] + c1[b % 2, i, j]",
    inputs=lambda: tuple(torch.randn(4, H, N, D) for _ in range(3)),
)
def bias_and_window_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin's shifted windows: [B*nW, H, N, N] viewed as [B, nW, ...], one mask for each window."""
    scores = q * 0.5 @ k.mT + m.p("bias", H, N, N)
    mask = m.b("mask", lambda: torch.randint(0, 2, (2, N, N)) * -100.0)
    scores = scores.view(-1, 2, H, N, N) + mask.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, H, N, N).softmax(-1) @ v


@spelling(
    "fused",
    score="0.5*s + c0[3*b + h, i // 3, i % 3, j // 3] + c1[3*b + h, i // 3, i % 3, j % 3]",
    inputs=lambda: tuple(torch.randn(B, H, 6, D) for _ in range(3)),
)
def bias_computed_from_q(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM, ViTDet: decomposed relative positions of a 2x3 window."""
    rows, columns = m.p("rows", 2, 2, D), m.p("columns", 3, 3, D)
    r = q.reshape(B * H, 2, 3, D)
    by_row, by_column = torch.einsum("bhwc,hkc->bhwk", r, rows), torch.einsum("bhwc,wkc->bhwk", r, columns)
    scores = (q * 0.5 @ k.mT).view(B * H, 2, 3, 2, 3) + by_row[:, :, :, :, None] + by_column[:, :, :, None, :]
    return scores.view(B, H, 6, 6).softmax(-1) @ v


@spelling("fused", inputs=lambda: tuple(torch.randn(B, H, 6, D) for _ in range(3)))
def bias_computed_from_q_by_two_products(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MViT: q times a gathered table, added to the keys' last axis only."""
    table = m.p("table", 4, D)[m.b("index", lambda: torch.randint(0, 4, (6, 6)))]
    return (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, table)).softmax(-1) @ v


@spelling("fused")
def bias_falling_with_distance(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi."""
    slopes = m.b("slopes", lambda: 2.0 ** -torch.arange(1, H + 1))
    distance = (torch.arange(N)[None] - torch.arange(N)[:, None]).abs()
    return (q @ k.mT * 0.5 - slopes[:, None, None] * distance).softmax(-1) @ v


@spelling("fused")
def bias_from_a_small_network(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin v2's continuous positions: 16 * sigmoid(mlp(coordinates))."""
    mlp = m.layer("mlp", lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, H)))
    bias = 16 * torch.sigmoid(mlp(m.b("coordinates", lambda: torch.randn(N, N, 2))).permute(2, 0, 1))
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("fused", score="s + c0[b, h, i, j]")
def two_products_summed(m: Any, x: Tensor) -> Tensor:
    """DeBERTa: content to content plus content to position, both from the tokens: one of them is a bias."""
    q, k, v = m.heads(x)
    p = m.layer("positions", lambda: nn.Linear(C, C))(x).view(B, N, H, D).transpose(1, 2)
    return (q @ k.mT + q @ p.mT).softmax(-1) @ v


@spelling("scores-kept", reason="read by", topk=3)
def scores_passed_on(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """RealFormer: the raw scores go on to the next layer."""
    scores = q @ k.mT + m.p("before", B, H, N, N)
    return scores.softmax(-1) @ v + scores.mean(), scores.sum(-1)


# ---- masks -----------------------------------------------------------------------------------------------------------


def some_keys() -> Tensor:
    """True where a key is masked; never all of a row."""
    mask = torch.rand(B, N) < 0.4
    mask[:, 1] = False
    return mask


@spelling("fused", score="where(c0[b, j], -oo, s)")
def masked_fill(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(m.b("mask", some_keys)[:, None, None], float("-inf")).softmax(-1) @ v


@spelling("fused", score="where(c0[i, j], s, -1000000000.0)")
def where(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = m.b("keep", lambda: torch.ones(N, N).tril().bool())
    return torch.where(keep, q @ k.mT, torch.tensor(-1e9, dtype=q.dtype)).softmax(-1) @ v


@spelling("fused")
def masked_where_zero(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = m.b("keep", lambda: torch.ones(1, 1, N, N).tril())
    return (q @ k.mT).masked_fill(keep == 0, -1e4).softmax(-1) @ v


@spelling(
    "fused",
    score="s + c0[b, 0, 0, j]",
    inputs=lambda: (*(torch.randn(B, H, N, D) for _ in range(3)), torch.randn(B, 1, 1, N)),
)
def mask_as_an_input(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("fused", inputs=lambda: (*(torch.randn(B, H, N, D) for _ in range(3)), ~some_keys()))
def mask_turned_additive(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """BERT: (1 - mask) * -10000."""
    return (q @ k.mT + (1.0 - keep[:, None, None].to(q.dtype)) * -10000.0).softmax(-1) @ v


@spelling("fused", score="where(c0[i, j], -oo, s)")
def causal_made_on_the_spot(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(future, float("-inf")).softmax(-1) @ v


@spelling("fused")
def causal_by_comparison(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(N)
    return torch.where(i[:, None] >= i[None, :], q @ k.mT, -1e9).softmax(-1) @ v


@spelling("fused", score="s*c0[i, j]")
def mask_learned_and_multiplied(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * m.p("mask", N, N)).softmax(-1) @ v


@spelling("fused")
def two_masks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Clamped, then filled (grounding DINO), with a combined boolean mask."""
    a, b = m.b("padding", some_keys), m.b("band", lambda: torch.ones(N, N).triu(2).bool())
    scores = torch.clamp(q @ k.mT, min=-50000.0, max=50000.0)
    return scores.masked_fill(a[:, None, None] & b, float("-inf")).masked_fill(~b.logical_not(), -20.0).softmax(-1) @ v


# ---- other pointwise work --------------------------------------------------------------------------------------------


@spelling("fused", score="5.0*tanh(0.2*s)")
def soft_cap(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 5.0) * 5.0).softmax(-1) @ v


@spelling("fused", score=f"{CLAMP}(s, -1.0, 1.0)")
def clamped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(-1, 1).softmax(-1) @ v


@spelling("fused")
def scores_bounded_by_a_constant_of_the_row(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PB-relax (CogView, LayoutLMv3): softmax((s/a - max(s/a)) * a)."""
    scaled = q @ k.mT / 32
    return ((scaled - scaled.amax(-1, keepdim=True)) * 32).softmax(-1) @ v


@spelling("fused")
def stable_with_a_detached_maximum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DALL-E: scaled down, the maximum subtracted without its gradient, scaled up again."""
    scaled = q @ k.mT / 1024
    return ((scaled - scaled.amax(-1, keepdim=True).detach()) * 1024).softmax(-1) @ v


@spelling("fused", score="where(c0[i, j], s, -1000000000.0)")
def filled_with_numbers_like_the_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of what a constant is made like only the shape is read."""
    scores, mask = q @ k.mT, m.b("mask", lambda: torch.ones(N, N).tril().bool())
    return torch.where(mask, scores, -1e9 * torch.ones_like(scores)).softmax(-1) @ v


@spelling("fused")
def a_mask_new_from_the_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.masked_fill(scores.new_ones(N, N).triu(1).bool(), scores.new_full((), -1e4)).softmax(-1) @ v


@spelling("fused", score="relu(s)", topk=1)
def rectified(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ties at zero: all of them are kept."""
    return F.relu(q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def softmax_without_a_dimension(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a matrix it is the last one; torch warns that leaving it out is deprecated."""
    return F.softmax(q[0, 0] @ k[0, 0].mT) @ v[0, 0]  # type: ignore[call-arg,unused-ignore]


@spelling("scores-kept", reason="leaves out a part")
def sink_column(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-OSS: an extra logit takes part in the softmax and is dropped after it."""
    scores = torch.cat([q @ k.mT, m.p("sinks", 1, H, 1, 1).expand(B, H, N, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@spelling("scores-kept", reason="leaves out a part")
def sink_column_in_front(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([m.p("sinks", 1, H, 1, 1).expand(B, H, N, 1), q @ k.mT], -1)
    return scores.softmax(-1)[..., 1:] @ v


@spelling("refused", reason="drawn inside")
def gumbel(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.gumbel_softmax(q @ k.mT, dim=-1) @ v


@spelling("scores-kept", reason="not pointwise")
def convolution_on_the_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.layer("conv", lambda: nn.Conv2d(H, H, 3, padding=1))(q @ k.mT).softmax(-1) @ v


@spelling("fused", score="s")
def centred_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.mean((-2, -1), keepdim=True)).softmax(-1) @ v


# ---- the softmax -----------------------------------------------------------------------------------------------------


@spelling("fused", score="s")
def softmax_function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT, dim=-1) @ v


@spelling("fused", score="s")
def softmax_of_torch(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, 3) @ v


@spelling("fused", score="s")
def softmax_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.softmax_module(q @ k.mT) @ v


@spelling("fused", score="s")
def softmax_in_another_dtype(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(q.dtype) @ v


@spelling("fused", score="s")
def softmax_of_a_cast(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).double().softmax(dim=-1).type_as(v) @ v


@spelling("fused", score="s")
def softmax_over_the_first_axis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("jbhi,bhjd->bhid", (q @ k.mT).permute(3, 0, 1, 2).softmax(0), v)


@spelling("fused", score="s")
def softmax_of_folded_rows(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).view(-1, N).softmax(-1).view(B, H, N, N) @ v


@spelling("fused", score="s")
def softmax_by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Hand.stable(q @ k.mT) @ v


@spelling("fused", score="s")
def softmax_by_hand_without_maximum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Hand.short(q @ k.mT) @ v


@spelling("fused", score="s")
def softmax_by_hand_with_detached_maximum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Hand.detached(q @ k.mT) @ v


@spelling("fused", score="s")
def softmax_by_hand_with_unsqueezed_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Hand.unsqueezed(q @ k.mT) @ v


@spelling("fused", score="s")
def softmax_by_hand_over_rows(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ Hand.stable(k @ q.mT, -2)).mT
