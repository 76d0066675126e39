"""Ways to write attention, each beside a neighbour that is not attention.

Every positive is found with the tier and the score it should have, equals the original at k = N in outputs and
gradients, and equals the reference lowering at k = 3.  Every negative is left alone, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import kvt_compile

B, H, N, D = 2, 3, 6, 4
C = H * D
FORCED: dict[str, Any] = {"topk": 1.0, "force_rewrite": True}


class Site(nn.Module):
    """Projections, and parameters a spelling may want; `body` is the spelling."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.qkv, self.out, self.one = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 1)
        self.heads_map, self.conv = nn.Linear(H, H), nn.Conv2d(H, H, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.table = nn.Parameter(torch.randn(2 * N - 1, H))
        self.codebook = nn.Parameter(torch.randn(N, C))
        self.register_buffer("causal", torch.ones(N, N).tril().bool())
        self.register_buffer("relative", torch.arange(N)[:, None] - torch.arange(N)[None] + N - 1)
        self.drop, self.softmax = nn.Dropout(0.0), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


POSITIVE: dict[str, tuple[str, str | None, Callable[[Any, Tensor], Any]]] = {}
NEGATIVE: dict[str, tuple[str, Callable[[Any, Tensor], Any]]] = {}


def found(tier: str = "fused", score: str | None = "s") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        POSITIVE[body.__name__] = (tier, score, body)
        return body

    return register


def left(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        NEGATIVE[body.__name__] = (reason, body)
        return body

    return register


# ---- products ------------------------------------------------------------------------------------------------------


@found()
def matmul(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return torch.matmul(q, k.transpose(-2, -1)).softmax(-1).matmul(v)


@found()
def heads_in_the_batch(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B * H, N, D) for y in m.parts(x))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v).view(B, H, N, D)


@found()
def linear_with_computed_weight(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B * H, N, D)[0] for y in m.parts(x))
    return F.linear(q, k).softmax(-1) @ v


@found()
def single_query(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return (q[:, :, :1] @ k.mT).softmax(-1) @ v


@found()
def grouped_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    k, v = (y[:, :1].repeat_interleave(H, 1) for y in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@found()
def windows(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B, H, 2, N // 2, D) for y in m.parts(x))
    return (q @ k.mT).softmax(-1) @ v


@left("not multiplied with values")
def learned_codebook(m: Any, x: Tensor) -> Tensor:
    return (x @ m.codebook.t()).softmax(-1) @ m.codebook


@left("product of two computed tensors")
def softmax_pooling(m: Any, x: Tensor) -> Tensor:
    return m.one(x).softmax(1).mT @ x


@left("product of two computed tensors")
def outlook(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.codebook).softmax(-1) @ x


@left("")
def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@left("product of two computed tensors")
def gate(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return (torch.stack([q, k], 1).softmax(1) * torch.stack([v, v], 1)).sum(1)


@left("not multiplied with values")
def classifier(m: Any, x: Tensor) -> Tensor:
    return m.out(x.mean(1)).softmax(-1)


# ---- scores --------------------------------------------------------------------------------------------------------


@found(score=None)
def cosine(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores * m.gain.clamp(max=1.2).exp()).softmax(-1) @ v


@found(score="where(causal[i, j], s, -oo)")
def causal_by_where(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return torch.where(m.causal, q @ k.mT, float("-inf")).softmax(-1) @ v


@found(score=None)
def causal_by_masked_fill_in_place(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = q @ k.mT
    scores.masked_fill_(~m.causal, -1e9)
    return scores.softmax(-1) @ v


@found(score=None)
def relative_position_table(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    bias = m.table[m.relative.view(-1)].view(N, N, H).permute(2, 0, 1)
    return ((q @ k.mT) + bias[None]).softmax(-1) @ v


@found(score=None)
def bias_written_into_a_slice(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = q @ k.mT
    scores[:, :, 1:, 1:] += m.table[m.relative[1:, 1:]].permute(2, 0, 1)
    return scores.softmax(-1) @ v


@found()
def softmax_in_another_dtype(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return (q @ k.mT).double().softmax(-1, dtype=torch.float64).to(v.dtype) @ v


@found()
def softmax_module_and_dropout(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return m.drop(m.softmax(q @ k.mT)) @ v


@found(score="0.5*s")
def sdpa(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*m.parts(x))


# ---- scores kept ---------------------------------------------------------------------------------------------------


@found("scores-kept", None)
def talking_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = m.heads_map((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return m.heads_map(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


@found("scores-kept", None)
def convolution_on_the_map(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    return m.conv(q @ k.mT).softmax(-1) @ v


@found("scores-kept", None)
def weights_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.parts(x)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@found("scores-kept", None)
def scores_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.parts(x)
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


@found("scores-kept", None)
def positional_gate(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    weights = (q @ k.mT).softmax(-1) * 0.7 + 0.3 * m.table[m.relative].permute(2, 0, 1).sigmoid()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@found()
def difference_of_two_halves(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.reshape(B, H, N, 2, D // 2).transpose(2, 3).reshape(B, 2 * H, N, D // 2) for y in m.parts(x))
    weights = (q @ k.mT).softmax(-1).view(B, H, 2, N, N)
    return (weights[:, :, 0] - 0.3 * weights[:, :, 1]) @ v[:, :H]


@found("scores-kept", None)
def sink_column(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.parts(x)
    scores = torch.cat([q @ k.mT, m.gain.expand(B, H, N, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@left("the same softmax")
def map_times_itself(m: Any, x: Tensor) -> Tensor:
    q, k, _ = m.parts(x)
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights


def outputs(result: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor)]


def gradients(module: nn.Module, call: Callable[..., Any], x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    found_ = outputs(call(x))
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in found_).backward()  # type: ignore[union-attr]
    return [*(y.detach() for y in found_), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("name", POSITIVE)
def test_attention_is_found_and_means_the_same(name: str) -> None:
    tier, score, body = POSITIVE[name]
    module, x = Site(body).double(), torch.randn(B, N, C, dtype=torch.float64)
    result = kvt_compile.rewrite(module, x, **FORCED)
    sites = result.report.sites
    assert {(site.outcome, None if score is None else site.score) for site in sites} == {(tier, score)}
    assert not result.report.refusals
    for mine, dense in zip(gradients(module, result.module, x), gradients(module, module, x), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", POSITIVE)
def test_fewer_keys_mean_what_the_reference_says(name: str) -> None:
    _, _, body = POSITIVE[name]
    module, x = Site(body).double(), torch.randn(B, N, C, dtype=torch.float64)
    found_, reference = (
        outputs(kvt_compile.rewrite(module, x, topk=2, lowering=lowering).module(x))
        for lowering in ("auto", "reference")
    )
    for mine, theirs, dense in zip(found_, reference, outputs(module(x)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        if name != "scores_returned":
            assert not torch.allclose(mine, dense), "no key was left out"
        break


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_only_looks_like_attention_is_left_alone(name: str) -> None:
    reason, body = NEGATIVE[name]
    module, x = Site(body), torch.randn(B, N, C)
    result = kvt_compile.rewrite(module, x, **FORCED)
    assert not result.report.sites
    for refusal in result.report.refusals:
        assert refusal.reason
        assert reason in refusal.reason
    assert len(result.report.refusals) == {"linear_attention": 2}.get(name, 1)
    torch.testing.assert_close(result.module(x), module(x), rtol=0, atol=0)


def test_channel_attention_is_left_dense_unless_asked_for() -> None:
    def channels(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.parts(x)
        return ((q.mT @ k).softmax(-1) @ v.mT).mT

    module, x = Site(channels), torch.randn(B, N, C)
    (site,) = kvt_compile.rewrite(module, x, topk=2).report.sites
    assert (site.axis, site.outcome, site.keys) == ("channel", "dense", D)
    assert "channel_attention" in site.reason
    (site,) = kvt_compile.rewrite(module, x, topk=2, channel_attention="rewrite").report.sites
    assert site.outcome == "fused"


def test_attention_over_the_batch_is_left_dense_unless_asked_for() -> None:
    class OverTheBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.qkv = nn.Conv2d(3, 8, 1), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.stem(x).mean((2, 3))).chunk(3, -1)
            return (q @ k.t()).softmax(-1) @ v

    x = torch.randn(5, 3, 4, 4)
    (site,) = kvt_compile.rewrite(OverTheBatch(), x, topk=2).report.sites
    assert (site.axis, site.outcome) == ("batch", "dense")
    (site,) = kvt_compile.rewrite(OverTheBatch(), x, topk=2, batch_attention="rewrite").report.sites
    assert site.outcome == "fused"


def test_the_place_is_the_line_of_the_model() -> None:
    module, x = Site(matmul), torch.randn(B, N, C)
    (site,) = kvt_compile.rewrite(module, x, topk=2).report.sites
    assert "test_spellings.py" in site.location


def test_a_product_feeding_two_softmaxes_is_two_sites() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.parts(x)
        scores = q @ k.mT
        return scores.softmax(-1) @ v + scores.mT.softmax(-1) @ v

    module, x = Site(both), torch.randn(B, N, C)
    result = kvt_compile.rewrite(module, x, **FORCED)
    assert len(result.report.sites) == 2
    torch.testing.assert_close(result.module(x), module(x), rtol=1e-4, atol=1e-5)
