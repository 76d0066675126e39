"""Models whose scores a formula would get wrong: each is rewritten at k = N and compared with itself, in outputs, in
gradients, and in which gradients there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spellings import CLAMP
from torch import Tensor, nn

import kvt_compile

N, D = 9, 8
TIMES = torch.tensor([1_700_000_000 + x for x in (0, 7, 13, 60, 61, 950, 3600, 3607, 86400)])
IDS = torch.tensor([1e9, 1e9, 1e9 + 1, 1e9 + 1, 1e9 + 2, 5.0, 5.0, 6.0, 6.0], dtype=torch.float64)
NEAR = 1e6 + torch.arange(N) * 0.3125


def pair(x: Tensor) -> Tensor:
    return x[:, None] - x[None]


@dataclass(frozen=True)
class Model:
    """Scores of a model with one captured tensor, and what of it the kernel is asked to compute."""

    scores: Callable[[Tensor, Tensor], Tensor]
    captured: Tensor
    text: str = ""
    """The score expression; "" where it does not matter."""
    dtype: torch.dtype = torch.float32
    draw: Callable[..., Tensor] = field(default=torch.randn)


def whole(*shape: int, dtype: torch.dtype) -> Tensor:
    """Products of these are whole numbers, and 0 and 6 are among them."""
    return torch.randint(-1, 3, shape).to(dtype)


MODELS = {
    # arithmetic of whole numbers is exact, and wraps
    "int64 times": Model(lambda s, t: s - 0.05 * pair(t), TIMES, "s - 0.05*(c[i] - c[j])"),
    "int64 times, divided": Model(lambda s, t: s - 0.05 * pair(t) / 60, TIMES),
    "int64 times, divided first": Model(lambda s, t: s - pair(t) / 60, TIMES, "s - (c[i] - c[j])/60.0"),
    "int64 times, of the keys first": Model(lambda s, t: s + (t[None] - t[:, None]).abs() * 1e-3, TIMES),
    "int64 products": Model(lambda s, t: s + (t[:, None] * t[None] % 1009).float() * 0.01, TIMES),
    "int64 products that wrap": Model(lambda s, t: s + (t[:, None] * t[None] * 4001) * 1e-19, TIMES),
    "uint8 differences": Model(lambda s, t: s + pair(t) * 0.01, (TIMES % 251).to(torch.uint8)),
    "uint8 negated": Model(lambda s, t: s + (-t)[:, None] * t[None] * 0.01, (TIMES % 251).to(torch.uint8)),
    "int8 sums": Model(lambda s, t: s + (t[:, None] + t[None]).abs() * 0.01, (TIMES % 120).to(torch.int8)),
    "int32 products": Model(lambda s, t: s + (t[:, None] * t[None]) * 1e-9, TIMES.to(torch.int32)),
    "int32 that become int64": Model(lambda s, t: s + (t[:, None].long() * t[None]) * 1e-18, TIMES.to(torch.int32)),
    "int16 squares": Model(lambda s, t: s + (pair(t) ** 2) * 1e-4, (TIMES % 30011).to(torch.int16)),
    # float64 in float64
    "float64 times": Model(lambda s, t: s - pair(t).abs().float(), TIMES.double() / 3, "s - float32(abs(c[i] - c[j]))"),
    "float64 products": Model(lambda s, t: s + (t[:, None] * t[None] - 1e18).float() * 1e-18, IDS),
    "float64 ids": Model(lambda s, t: s + torch.where(t[:, None] != t[None], -1e4, 0.0), IDS),
    "float64 ids as a mask": Model(lambda s, t: s.masked_fill(t[:, None] < t[None], -torch.inf), IDS),
    "float64 and a number": Model(lambda s, t: torch.where((t[:, None] + 0.1) == (t[None] + 0.1), s, -1e4), IDS),
    "int64 against float32": Model(
        lambda s, t: s.masked_fill((t[:, None] == t[None].float()), -3.0), torch.arange(N) + 2**24, ""
    ),
    # float32 in float32, in the model's order
    "float32 near 1e6": Model(lambda s, p: s - (pair(p) / 10).abs(), NEAR, "s - abs((c[i] - c[j])/10.0)"),
    "float32 near 1e6, squared": Model(lambda s, p: s - (p[:, None] * p[None] - p[None] * p[None]) * 1e-3, NEAR),
    "float32 sums that round": Model(lambda s, p: s + ((p[:, None] + 1e8) - 1e8) * p[None] * 1e-9, NEAR),
    "float32 for scores in float64": Model(lambda s, p: s - pair(p) * 0.1, NEAR, dtype=torch.float64),
    # what is made of the scores, in their order
    "a large number comes and goes": Model(lambda s, m: (s + 1e9) - 1e9, torch.ones(())),
    "a large tensor comes and goes": Model(lambda s, m: (s - m) + m, torch.tensor(3e8)),
    "times 0 by 0": Model(lambda s, m: s * m / m, torch.tensor(0.0), "s*c/c"),
    "by 0 times 0": Model(lambda s, m: s / m * m, torch.tensor(0.0)),
    "beyond float32 and back": Model(lambda s, m: s * 1e30 * m * 1e-38, torch.tensor(1e10)),
    "distributed": Model(lambda s, m: 0.3 * (s + 1e8) - 3e7, torch.ones(())),
    "infinity minus itself": Model(lambda s, m: torch.where(s > 0, s, (s + m) - m), torch.tensor(torch.inf)),
    # kinks
    "relu6": Model(lambda s, m: F.relu6(s), torch.ones(()), "hardtanh(s, 0.0, 6.0)", draw=whole),
    "hardtanh": Model(lambda s, m: F.hardtanh(s, -2.0, 3.0), torch.ones(()), draw=whole),
    "clamp": Model(lambda s, m: s.clamp(-2.0, 3.0), torch.ones(()), f"{CLAMP}(s, -2.0, 3.0)", draw=whole),
    "clamp, its bounds exchanged": Model(lambda s, m: s.clamp(3.0, -2.0) * m + s, torch.ones(()), draw=whole),
    "clamp from below": Model(lambda s, m: s.clamp(min=-1.0) * m, torch.tensor(0.5), draw=whole),
    "clamp from above": Model(lambda s, m: torch.clamp_max(s, 1.0) * m, torch.tensor(0.5), draw=whole),
    "relu": Model(lambda s, m: F.relu(s) * m, torch.ones(()), draw=whole),
    "abs": Model(lambda s, m: s.abs() * m, torch.ones(()), draw=whole),
    "maximum": Model(lambda s, m: torch.maximum(s, m), torch.tensor(1.0), draw=whole),
    "minimum": Model(lambda s, m: torch.minimum(s, m[:, None]), torch.arange(N) - 4.0, draw=whole),
    "square": Model(lambda s, m: (s - 2) ** 2 * m, torch.tensor(0.1), draw=whole),
    # which gradients there are
    "a comparison": Model(lambda s, m: s.masked_fill(m > 0, -1.0), torch.linspace(-1, 1, N)),
    "a tensor of numbers by a mask": Model(lambda s, m: torch.where(m[:, None] > m, s, s * 0.5), torch.randn(N)),
}


class Attention(nn.Module):
    def __init__(self, scores: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, captured: Tensor) -> Tensor:
        return self.scores(q @ k.transpose(-1, -2) * 0.25, captured).softmax(-1) @ v


def run(module: nn.Module, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    out = module(*leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
    return out.detach(), [x.grad for x in leaves]


COMPILED = (
    "int64 times", "uint8 negated", "int32 that become int64", "int16 squares", "float64 times", "float64 ids",
    "float64 and a number", "float32 near 1e6, squared", "float32 for scores in float64", "times 0 by 0", "relu6",
)  # fmt: skip
"""One of each kind: a C compiler takes a second for each."""


@pytest.mark.parametrize(("name", "lowering"), [*((x, "aten") for x in MODELS), *((x, "c") for x in COMPILED)])
def test_as_the_model(name: str, lowering: str) -> None:
    model = MODELS[name]
    torch.manual_seed(0)
    tensors = [model.draw(2, 2, N, D, dtype=model.dtype) for _ in range(3)]
    if model.draw is whole:
        tensors[0] = tensors[0] * 4  # which the scale takes back
    tensors.append(model.captured)
    module = Attention(model.scores)
    rewritten: Any = kvt_compile.rewrite(module, *tensors, topk=1.0, force_rewrite=True, lowering=lowering)
    (site,) = rewritten.report.sites
    assert site.outcome.startswith("fused"), site
    if model.text:
        assert site.score.replace("0.25*s", "s").replace("captured", "c") == model.text
    (out, gradients), (expected, wanted) = run(rewritten.module, tensors), run(module, tensors)
    close = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(out, expected, **close)
    for gradient, want, x in zip(gradients, wanted, ["q", "k", "v", "captured"], strict=True):
        assert (gradient is None) == (want is None), x
        if gradient is not None and want is not None:
            torch.testing.assert_close(gradient, want, msg=lambda text, x=x: f"{x}: {text}", **close)
