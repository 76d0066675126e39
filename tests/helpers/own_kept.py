"""Attentions that keep keys by themselves, written as one function of the scores: is the model's own k found, and is
every number what it was?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kvt_compile

N, D, K = 16, 8, 4
INF = torch.inf
Weights = Callable[[Tensor], Tensor]
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def top(s: Tensor, k: int = K) -> Tensor:
    """Where the k largest of every row stand, by their positions."""
    return torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(k, -1).indices, True)


def least(s: Tensor, k: int = K) -> Tensor:
    """The k-th largest of every row."""
    return s.topk(k, -1).values[..., -1:]


def keep(s: Tensor, kept: Tensor, fill: float = -INF) -> Tensor:
    return s.masked_fill(~kept, fill)


def of_scores(weights: Weights) -> Model:
    return lambda q, k, v: weights(q @ k.mT) @ v


def tensors(dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, N, D, generator=generator) for _ in range(3))
    return [x.to(dtype) for x in (q * 3, k, v)]


class Attention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.model(q, k, v)


def own_ks(model: Model | nn.Module, inputs: list[Tensor] | None = None, alike: float = 2e-5) -> list[str]:
    """The k of every site that keeps the model's own, after the outputs and gradients were found to be the model's."""
    module = model if isinstance(model, nn.Module) else Attention(model)
    given = tensors() if inputs is None else inputs
    rewritten = kvt_compile.rewrite(module, *given, topk=1.0, force_rewrite=True)
    found, expected = (_numbers(x, given) for x in (rewritten.module, module))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(
            x, y, rtol=10 * alike, atol=alike * max(1.0, float(y.abs().nan_to_num().max())), equal_nan=True
        )
    return [site.own_k for site in rewritten.report.sites if site.own_k]


def _numbers(call: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in given]
    out = call(*inputs)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad((out * factors).sum(), inputs, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))]
