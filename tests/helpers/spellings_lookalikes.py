"""What looks like attention and is not, or is attention over something that is no token: every softmax left alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings import B, C, D, H, N, spelling
from torch import Tensor, nn

# ---- no product of queries and keys ----------------------------------------------------------------------------------


@spelling("refused", reason="product of two computed tensors")
def softmax_pooling(m: Any, x: Tensor) -> Tensor:
    """Global context block: a softmax over positions of a linear map."""
    return m.layer("one", lambda: nn.Linear(C, 1))(x).softmax(1).mT @ x


@spelling("refused", reason="product of two computed tensors")
def softmax_pooling_of_maps(m: Any, x: Tensor) -> Tensor:
    """GCNet on feature maps: [B, 1, 1, N] weights times [B, 1, N, C] values."""
    weights = m.layer("conv", lambda: nn.Conv1d(C, 1, 1))(x.mT).softmax(-1)
    return weights.unsqueeze(1) @ x.unsqueeze(1)


@spelling("refused", reason="product of two computed tensors")
def weights_from_a_linear_layer(m: Any, x: Tensor) -> Tensor:
    """VOLO's outlook attention: the map is a linear layer of each token."""
    weights = m.layer("attn", lambda: nn.Linear(C, H * N))(x).view(B, N, H, N).transpose(1, 2) * 0.5
    return weights.softmax(-1) @ m.heads(x)[2]


@spelling("refused", reason="product of two computed tensors")
def mixture_of_kernels(m: Any, x: Tensor) -> Tensor:
    """Dynamic convolution: a softmax over expert kernels."""
    weights = m.layer("router", lambda: nn.Linear(C, 4))(x.mean(1)).softmax(-1)
    return weights @ torch.tanh(x.flatten(1)[:, :40].view(B, 4, 10).mean(0))


@spelling("refused", reason="product of two computed tensors")
def selective_kernel(m: Any, x: Tensor) -> Tensor:
    """SK and ResNeSt: a softmax over branches, multiplied elementwise and summed."""
    branches = torch.stack([torch.sin(x), torch.cos(x)], 1)
    gate = m.layer("gate", lambda: nn.Linear(C, 2 * C))(branches.sum(1).mean(1)).view(B, 2, 1, C).softmax(1)
    return (branches * gate).sum(1)


@spelling("refused", reason="not multiplied with values")
def gating(m: Any, x: Tensor) -> Tensor:
    return x * m.layer("gate", lambda: nn.Linear(C, C))(x).softmax(-1)


@spelling("refused", reason="not multiplied with values")
def classifier_head(m: Any, x: Tensor) -> Tensor:
    return m.layer("head", lambda: nn.Linear(C, 10))(x.mean(1)).softmax(-1)


@spelling("fused", "refused")
def attention_and_classifier_head(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    x = m.merge((q @ k.mT).softmax(-1) @ v)
    return m.layer("head", lambda: nn.Linear(C, 10))(x.mean(1)).softmax(-1)


@spelling("refused", reason="not multiplied with values")
def router(m: Any, x: Tensor) -> Any:
    """A mixture of experts' router: softmax, then topk."""
    return m.layer("router", lambda: nn.Linear(C, 4))(x).softmax(-1).topk(2, -1).values


@spelling("refused", reason="product of two computed tensors")
def router_by_product(m: Any, x: Tensor) -> Tensor:
    """Soft mixture of experts: the router's softmax weighs the experts' outputs."""
    experts = torch.stack([torch.sin(x), torch.cos(x), x], 2)
    return (m.layer("router", lambda: nn.Linear(C, 3))(x).softmax(-1).unsqueeze(2) @ experts).squeeze(2)


@spelling("refused", reason="nobody reads")
def attention_nobody_reads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    unused = (q @ k.mT).softmax(-1) @ v
    return v + unused.shape[0]


# ---- learned tables --------------------------------------------------------------------------------------------------


@spelling("refused")
def external_attention(m: Any, x: Tensor) -> Tensor:
    """Keys and values are parameters: two linear layers with a softmax between."""
    return F.linear(x, m.p("keys", 6, C)).softmax(-1) @ m.p("values", 6, C)


@spelling("refused")
def codebook(m: Any, x: Tensor) -> Tensor:
    codes = m.p("codes", 6, C)
    return (x @ codes.t()).softmax(-1) @ codes


_FEATURES = "features that a layer computed"


@spelling("refused", reason=_FEATURES)
def learned_keys_mixed_over_rows(m: Any, x: Tensor) -> Tensor:
    """Rows of a score against learned keys, mixed by a layer: no learned queries of 6 tokens."""
    scores = F.linear(torch.cat([x, x.sin()], 1), m.p("keys", 6, C)).view(B, 2, N, 6).permute(0, 2, 3, 1)
    weights = (scores @ m.p("mix", 2, 2)).softmax(2)
    return weights.permute(0, 3, 1, 2) @ m.p("values", 6, C).sin().expand(B, 2, 6, C)


@spelling("refused", reason=_FEATURES)
def router_of_low_rank(m: Any, x: Tensor) -> Tensor:
    """A mixture of experts whose router compares what a layer says of each with a learned vector."""
    said = m.layer("router", lambda: nn.Linear(C, 4 * D))(x.mean(1)).view(B, 4, D)
    experts = torch.stack([x.mean(1), x.amax(1), torch.sin(x).sum(1), x[:, 0]], 1)
    return (said @ m.p("wanted", D, 1)).softmax(1).mT @ experts


@spelling("refused", reason=_FEATURES)
def channels_asked_by_a_learned_query(m: Any, x: Tensor) -> Tensor:
    maps = m.layer("conv", lambda: nn.Conv1d(C, 6, 1))(x.mT)
    return (m.p("where", 1, N) @ maps.mT).softmax(-1) @ torch.tanh(maps)


@spelling("refused", reason="not multiplied with values")
def learned_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ m.p("values", B, H, N, D)


@spelling("refused")
def learned_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ m.p("keys", H, D, N)).softmax(-1) @ v


@spelling("refused", reason="product of two computed tensors")
def learned_queries_as_a_layer(m: Any, x: Tensor) -> Tensor:
    """Pooling by a linear layer of the tokens, as gates and global context blocks spell it."""
    return F.linear(x, m.p("latent", 2, C)).softmax(1).mT @ x


@spelling("refused", reason="keys are a learned table")
def learned_queries_over_themselves(m: Any, x: Tensor) -> Tensor:
    """The softmax runs over the learned vectors: they are the keys, as in a router."""
    return torch.einsum("bnd,sd->bsn", x, m.p("latent", 2, C)).softmax(1).mT @ x[:, :2]


@spelling("refused")
def learned_map(m: Any, x: Tensor) -> Tensor:
    """Synthesizer: the map is a parameter."""
    return m.p("map", N, N).softmax(-1) @ x


# ---- the wrong axis --------------------------------------------------------------------------------------------------


@spelling("refused", "refused")
def linear_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention: q and k normalised apart, k v first."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@spelling("refused", reason="product of two computed tensors")
def factorised_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CoaT: softmax over the keys alone."""
    return q @ (k.softmax(dim=2).mT @ v)


@spelling("refused", reason="not multiplied with values")
def separable_attention(m: Any, x: Tensor) -> Tensor:
    """MobileViT v2: one context score per token, summed against the keys."""
    q, k, v = m.layer("split", lambda: nn.Linear(C, 1 + 2 * C))(x).split([1, C, C], -1)
    return F.relu(v) * (k * q.softmax(1)).sum(1, keepdim=True)


@spelling("refused", reason="product of two computed tensors")
def lambda_layer(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    content = torch.einsum("bhjd,bhje->bhde", k.softmax(2), v)
    return torch.einsum("bhid,bhde->bhie", q, content)


@spelling("refused", reason="sums over")
def softmax_over_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


@spelling("refused", reason="sums over")
def slots(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention: slots compete for tokens, then each slot averages."""
    weights = (q @ k.mT).softmax(-2)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("refused", reason="sums over")
def softmax_over_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


@spelling("refused", reason="sums over")
def softmax_over_the_batch(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(0) @ v


@spelling("refused", reason="sums over")
def product_over_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).mT @ v


@spelling("refused")
def softmax_over_everything(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).flatten(1).softmax(-1).view(B, H, N, N) @ v


@spelling("refused")
def map_times_itself(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights


@spelling("refused", reason="single key")
def one_key(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1]


# ---- nothing is weighed ----------------------------------------------------------------------------------------------


@spelling("refused", reason="not multiplied with values")
def map_alone(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


@spelling("refused", reason="not multiplied with values")
def map_times_values_elementwise(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) * (q @ v.mT)


@spelling("refused")
def map_through_a_layer(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The map itself is the feature."""
    return m.layer("after", lambda: nn.Linear(N, 3))((q @ k.mT).softmax(-1))


# ---- no softmax at all -----------------------------------------------------------------------------------------------


@spelling("refused", reason="stands sigmoid(s)")
def sigmoid_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sigmoid() @ v


@spelling("refused", reason="stands s / 5")
def product_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) / N @ v


@spelling("refused", reason="stands s:")
def relu_linear_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q) @ (F.relu(k).mT @ v)


@spelling("refused", reason="s - logsumexp(s)")
def log_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT, -1) @ v


@spelling("refused", reason="/ sum(exp(")
def exponentials_over_another_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return (e / torch.exp(k @ q.mT).sum(-1, keepdim=True)) @ v


# ---- attention over something else -----------------------------------------------------------------------------------


@spelling("dense", reason="channel_attention")
def channel_attention(m: Any, x: Tensor) -> Tensor:
    """XCiT: [D, N] times [N, D]."""
    q, k, v = (y.mT for y in m.heads(x))
    return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.p("t", H, 1, 1)).softmax(-1) @ v).mT


@spelling("dense", reason="channel_attention")
def channel_attention_of_groups(m: Any, x: Tensor) -> Tensor:
    """DaViT: groups of channels attend within themselves."""
    q, k, v = m.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    return (((k * 0.2).mT @ v).softmax(-1) @ q.mT).mT


@spelling("dense", reason="channel_attention", inputs=lambda: (torch.randn(B, C, 3, 3),))
def channel_attention_of_maps(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.layer("conv", lambda: nn.Conv2d(C, 3 * C, 1))(x).view(B, 3, H, D, 9).unbind(1)
    return (q @ k.mT).softmax(-1) @ v


@spelling("dense", reason="batch_attention", inputs=lambda: (torch.randn(6, 3, 4, 4),))
def batch_attention(m: Any, x: Tensor) -> Tensor:
    """csatv2: `q @ k.T` on (B, C)."""
    y = m.layer("stem", lambda: nn.Conv2d(3, C, 1))(x).mean((2, 3))
    q, k, v = m.qkv(y).chunk(3, -1)
    return (q @ k.t()).softmax(-1) @ v


@spelling("refused", "refused")
def factorised_attention_in_two_blocks(m: Any, x: Tensor) -> Tensor:
    """CoaT: the second block's keys are a linear map of a product that has the tokens of the first block's queries."""
    for block in ("first", "second"):
        q, k, v = m.layer(block, lambda: nn.Linear(C, 3 * C))(x).chunk(3, -1)
        x = x + q @ (k.softmax(1).mT @ v)
    return x


@spelling(*["refused"] * 12)
def many_ways_through_layers(m: Any, x: Tensor) -> Tensor:
    """Twelve blocks of two branches each: a reader that follows every way anew would follow 4096 of them."""
    for n in range(12):
        q, k, v = m.layer(f"{n}", lambda: nn.Linear(C, 3 * C))(x).chunk(3, -1)
        x = m.layer(f"l{n}", lambda: nn.Linear(C, C))(x) + m.layer(f"r{n}", lambda: nn.Linear(C, C))(x)
        x = (x + q @ (k.softmax(1).mT @ v)).tanh()
    return x
