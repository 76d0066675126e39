"""A random way to normalise rows, checked: every softmax is found, nothing else is fused, and the meaning stays.

A softmax that is taken of nothing but the scores and exact factors has to be fused, whatever it is written as.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_check import set_arguments, traced
from fuzz_normalisers import Normalised
from hypothesis import assume
from spellings import B, D, H, N, knn_softmax
from torch import Tensor, fx, nn

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes
from kvt_compile.passes.site import Fused

ALL = Policy(topk=1 << 20, force_rewrite=True)


class Drawn(nn.Module):
    """The drawn text as a module."""

    def __init__(self, drawn: Normalised) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.bias, self.gain = nn.Parameter(torch.randn(H, N, N)), nn.Parameter(torch.randn(N))
        self.register_buffer("mask", torch.rand(N, N) < 0.7)
        with torch.no_grad():
            self.mask |= torch.eye(N).bool()
        self.source, self.log = compile(drawn.source, "drawn", "exec"), drawn.log

    def names(self, s: Tensor, v: Tensor) -> dict[str, Any]:
        return {"torch": torch, "F": F, "s": s, "v": v, "bias": self.bias, "gain": self.gain, "mask": self.mask}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        names = self.names(q @ k.mT, v)
        exec(self.source, names)
        out: Tensor = names["out"]
        return out

    def knn(self, topk: int) -> Callable[..., Tensor]:
        """The softmax of what it is one of, over the k largest, by hand."""

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return knn_softmax(eval(self.log, self.names(q @ k.mT, v)), -1, topk) @ v

        return call


def shown(call: Callable[..., Any], module: nn.Module) -> list[Tensor | None]:
    torch.manual_seed(3)
    tensors = [torch.randn(B, H, N, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = call(*tensors)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [*tensors, *module.parameters()], allow_unused=True)]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], which: bool, what: str) -> None:
    """which: also which gradients exist."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert not which or (mine is None) == (theirs is None), f"a gradient is there in one of them alone\n{what}"
        if mine is not None and theirs is not None:
            assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-8), f"off by {(mine - theirs).abs().max()}\n{what}"


def check(drawn: Normalised) -> str:
    """What became of it: "fused", "none" (it is no softmax), or why it was not fused."""
    module = Drawn(drawn).double()
    torch.manual_seed(3)
    graph = traced(module, [torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3)])
    result = run_passes(graph, ALL, lowering="aten")
    sites = [decision.site for decision in result.decisions]
    what = f"{drawn.source}\n{[(x.tier, x.score, x.tier_reason) for x in sites]} {[x.reason for x in result.refusals]}"
    fused = [site for site in sites if isinstance(site.plan, Fused)]
    assert sites or result.refusals, f"nothing is said\n{what}"
    dense = shown(module, module)
    assume(all(x is None or bool(x.isfinite().all()) for x in dense))  # the logarithm of a mask has no gradient
    assert_same(shown(fx.Interpreter(graph).run, module), dense, True, what)
    if drawn.log and fused:
        set_arguments(graph, topk=2)
        assert_same(shown(fx.Interpreter(graph).run, module), shown(module.knn(2), module), False, what)
    if not drawn.log:
        assert not fused, f"fused, but no softmax\n{what}"
        return "none"
    return "fused" if fused else what
