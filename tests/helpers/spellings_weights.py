"""Spellings of what happens to the attention weights: dropout, gates, mixtures of maps, other readers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings import B, D, H, N, spelling
from torch import Tensor, nn


@spelling("fused", weight="p")
def dropout_of_nothing(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), p=0.0, training=True) @ v


@spelling("fused", weight="p")
def dropout_in_evaluation(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.3, False) @ v


@spelling("fused", weight="p")
def dropout_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.dropout((q @ k.mT).softmax(-1)) @ v


@spelling("fused", weight="p*c0[h, 0, 0]")
def head_gate(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * m.p("gate", H, 1, 1)) @ v


@spelling("fused")
def head_gate_beside_a_bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * m.p("scale")) @ k.mT + m.p("bias", H, N, N)
    return (scores.softmax(-1) * torch.sigmoid(m.p("gate", H, 1, 1))) @ v


@spelling("fused")
def mask_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * m.b("mask", lambda: (torch.rand(N, N) < 0.7).float()).to(q.dtype)) @ v


@spelling("fused", weight="where(c0[i, j], 0.0, p)")
def masked_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SpeechBrain: what was masked before is set to nothing once more."""
    mask = m.b("mask", lambda: torch.ones(N, N).triu(1).bool())
    return (q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1).masked_fill(mask, 0.0) @ v


def some_rows() -> Tensor:
    """True where a key is masked: all of the third row."""
    return torch.arange(N)[:, None].eq(2) | (torch.arange(N) > 3)


@spelling("fused", weight="where(ne(p, p), 0.0, p)")
def nan_to_num_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sparsifiner: a row without a key is nothing."""
    return (q @ k.mT).masked_fill(m.b("mask", some_rows), -torch.inf).softmax(-1).nan_to_num(0.0) @ v


@spelling("fused", weight="where(ne(p, p), 0.0, p)")
def nan_filled_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(m.b("mask", some_rows), -torch.inf).softmax(-1)
    return weights.masked_fill(weights.isnan(), 0.0) @ v


@spelling("scores-kept", reason="nan_to_num between the two products")
def ones_for_nan_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).nan_to_num(1.0) @ v


@spelling("fused", weight="p")
def nan_to_num_before_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Differential transformer: of finite scores they are the scores."""
    return torch.nan_to_num(q @ k.mT * 0.5).softmax(-1) @ v


@spelling("scores-kept", reason="revive dropped keys")
def filled_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = m.b("mask", lambda: torch.ones(N, N).triu(1).bool())
    return (q @ k.mT).softmax(-1).masked_fill(mask, 0.5) @ v


@spelling("fused", weight="0.5*p")
def weights_scaled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) / 2) @ v


@spelling("scores-kept", reason="gather between the two products")
def rows_of_the_map_gathered(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Adaptive token sampling: the map of the tokens that are kept."""
    chosen = m.b("chosen", lambda: torch.tensor([4, 0, 2])).view(1, 1, 3, 1).expand(B, H, 3, N)
    return (q @ k.mT).softmax(-1).gather(2, chosen) @ v


@spelling("scores-kept", reason="index_select between the two products")
def rows_of_the_map_selected(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).index_select(2, m.b("chosen", lambda: torch.tensor([4, 0, 2]))) @ v


@spelling("refused", reason="not the axis the product")
def keys_of_the_map_gathered(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).index_select(3, m.b("chosen", lambda: torch.tensor([4, 0, 2]))) @ v[:, :, :3]


@spelling("scores-kept", reason="not pointwise")
def talking_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CaiT: a linear map over the heads before and after."""
    before, after = m.layer("before", lambda: nn.Linear(H, H)), m.layer("after", lambda: nn.Linear(H, H))
    scores = before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


@spelling("scores-kept", reason="not pointwise")
def talking_heads_by_convolution(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """EfficientFormer v2."""
    before, after = m.layer("before", lambda: nn.Conv2d(H, H, 1)), m.layer("after", lambda: nn.Conv2d(H, H, 1))
    return after(before(q @ k.mT).softmax(-1)) @ v


@spelling("scores-kept")
def talking_heads_by_einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), m.p("mix", H, H))
    return weights @ v


@spelling("scores-kept")
def re_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepViT: heads mixed after the softmax, then normalised."""
    weights = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), m.p("theta", H, H))
    return m.layer("norm", lambda: nn.BatchNorm2d(H).eval())(weights) @ v


@spelling("fused")
def difference_of_two_halves(m: Any, x: Tensor) -> Tensor:
    """Differential attention: one softmax over doubled heads."""
    q, k, v = (y.reshape(B, H, N, 2, D // 2).transpose(2, 3).reshape(B, 2 * H, N, D // 2) for y in m.heads(x))
    weights = (q @ k.mT).softmax(-1).view(B, H, 2, N, N)
    return (weights[:, :, 0] - m.p("lam") * weights[:, :, 1]) @ v[:, :H]


@spelling("fused")
def difference_of_one_half(m: Any, x: Tensor) -> Tensor:
    """Both terms read the same elements: they are one expression of them, and one kernel."""
    q, k, v = m.heads(x)
    weights = (q @ k.mT).softmax(-1).view(B, 1, H, N, N)
    return (weights[:, 0] - m.p("gate", N, 1) * weights[:, 0].sin()) @ v


@spelling("scores-kept", trainable=False)
def difference_of_two_halves_written_over(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B, H, N, 2, D // 2).transpose(2, 3).reshape(B, 2 * H, N, D // 2) for y in m.heads(x))
    weights = (q @ k.mT).softmax(-1).view(B, H, 2, N, N)
    weights[:, :, 0] -= m.p("lam") * weights[:, :, 1]
    return weights[:, :, 0] @ v[:, :H]


@spelling("scores-kept", reason="read by")
def difference_of_two_halves_and_another_reader(m: Any, x: Tensor) -> Any:
    q, k, v = (y.reshape(B, H, N, 2, D // 2).transpose(2, 3).reshape(B, 2 * H, N, D // 2) for y in m.heads(x))
    weights = (q @ k.mT).softmax(-1).view(B, H, 2, N, N)
    return (weights[:, :, 0] - m.p("lam") * weights[:, :, 1]) @ v[:, :H], weights.amax()


@spelling("fused", "fused")
def difference_of_two_softmaxes(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    return (first - m.p("lam") * second) @ v


@spelling("fused", "fused")
def scaled_sum_of_two_softmaxes_folded(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled as a whole, negative first, heads folded into the batch before the product."""
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    weights = -(m.p("gate", H, 1, 1) * first + second / 2) * m.p("row", N, 1)
    return torch.bmm(weights.reshape(B * H, N, N), v.reshape(B * H, N, D)).view(B, H, N, D)


@spelling("fused", "scores-kept", reason="also read by")
def difference_of_two_softmaxes_one_returned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    return (first - m.p("lam") * second) @ v, second


@spelling("fused", "fused")
def difference_of_two_outputs(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused spelling: two calls of SDPA."""
    first = F.scaled_dot_product_attention(q[..., :2], k[..., :2], v)
    return first - m.p("lam") * F.scaled_dot_product_attention(q[..., 2:], k[..., 2:], v)


@spelling("fused", "refused")
def positional_gate(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ConViT: a mixture of content attention and a learned positional map, normalised again."""
    content = (q @ k.mT).softmax(-1)
    positions = m.layer("positions", lambda: nn.Linear(3, H))(m.b("where", lambda: torch.randn(N, N, 3)))
    gate = torch.sigmoid(m.p("gate", H)).view(1, -1, 1, 1)
    weights = (1.0 - gate) * content + gate * positions.permute(2, 0, 1)[None].softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("fused", "fused")
def two_softmaxes_normalised_again_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of them subtracted, and a number that keeps the sum from being zero."""
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    gate = torch.sigmoid(m.p("gate", H)).view(1, -1, 1, 1)
    weights = 3 * first - gate * second
    weights /= weights.sum(dim=-1).unsqueeze(-1) + 1e-3
    return weights @ v


@spelling("fused")
def one_softmax_normalised_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * m.p("gate", H, 1, 1).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("scores-kept", "scores-kept", reason="sum between the two products")
def two_softmaxes_gated_by_key_normalised_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a row sums up to depends on the keys that it keeps."""
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    weights = torch.sigmoid(m.p("gate", N)) * first + second
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("scores-kept", "scores-kept", reason="sum between the two products")
def two_softmaxes_normalised_by_column(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    weights = first + second
    return (weights / (1 + weights.sum(-2, keepdim=True))) @ v


@spelling("scores-kept", "refused", reason="sum between the two products")
def positional_map_normalised_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The other map is no softmax: its rows do not sum up to 1."""
    content = (q @ k.mT).softmax(-1)
    weights = 0.7 * content + 0.3 * (1 + m.p("table", N, N).softmax(-1)) * content.new_ones(B, H, 1, 1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("scores-kept", reason="read by")
def weights_returned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT * 0.5).softmax(-1)
    return weights @ v, weights


@spelling("scores-kept", reason="read by")
def weights_averaged_over_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT * 0.5).softmax(-1)
    return weights @ v, weights.mean(1)


@spelling("scores-kept", reason="read by")
def scores_returned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


@spelling("scores-kept", reason="read by")
def two_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One map, two products: the map is worth making once."""
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ torch.sin(v)


@spelling("scores-kept", reason="read by")
def two_values_and_another_reader(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ torch.sin(v), weights.amax()


@spelling("scores-kept", "scores-kept")
def one_product_two_softmaxes(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grounding DINO: each side attends to the other."""
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mT.softmax(-1) @ torch.sin(v)


@spelling("scores-kept", reason="revive")
def weights_plus_a_constant(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + 0.01) @ v


@spelling("scores-kept", reason="revive")
def one_minus_the_weights(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (1 - (q @ k.mT).softmax(-1)) @ v


@spelling("scores-kept", reason="revive")
def weights_plus_identity(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A skip connection inside the map."""
    return ((q @ k.mT).softmax(-1) + torch.eye(N, dtype=q.dtype)) @ v
