"""A function of scores -> how the attention it makes is rewritten, after a check that no number changes with k = N."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import kvt_compile

N, D = 16, 8
Scores = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
MASK = (torch.rand(N, N, generator=GENERATOR) < 0.4) & ~torch.eye(N).bool()
FAR = torch.where(MASK, -1e30, 0.0)


class Weighed(nn.Module):
    """weights(q @ k.mT) @ v, with parameters and buffers that the weights may read."""

    def __init__(self, weights: Callable[..., Tensor], parameter: Tensor | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.parameter = None if parameter is None else nn.Parameter(parameter)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        weights = self.weights(scores) if self.parameter is None else self.weights(scores, self.parameter)
        return weights @ v


def inputs(seed: int = 0, dead: int = 0) -> list[Tensor]:
    """Queries, keys and values [2, N, D]; the last `dead` keys are zeros."""
    made = [torch.randn(2, N, D, generator=torch.Generator().manual_seed(seed + n)) for n in range(3)]
    made[1][:, N - dead :] = 0
    return [x.requires_grad_() for x in made]


def outcome(module: nn.Module, tensors: Sequence[Tensor] | None = None, tolerance: float = 1e-4) -> str:
    """ "fused", "scores-kept" or "dense".  Outputs and gradients are checked, those of parameters too."""
    tensors = inputs() if tensors is None else tensors
    rewritten = kvt_compile.rewrite(module, *tensors, topk=1.0, force_rewrite=True)
    out, expected = rewritten.module(*tensors), module(*tensors)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 10, equal_nan=True)
    if tensors[0].requires_grad:
        mine = [*tensors, *rewritten.module.parameters()]
        theirs = [*tensors, *module.parameters()]
        got = torch.autograd.grad(out.square().sum(), mine)
        for one, other in zip(got, torch.autograd.grad(expected.square().sum(), theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    sites = rewritten.report.sites
    return sites[0].outcome if sites else "dense"
