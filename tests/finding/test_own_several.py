"""Several selections of one score map, as restoration models have them: each keeps its own k."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_own_selection import captured
from torch import Tensor, nn

from kvt_compile.passes.decide import Policy


def selected(t: Tensor, k: int) -> Tensor:
    mask = torch.zeros(t.shape, device=t.device, requires_grad=False)
    mask.scatter_(-1, torch.topk(t, k=k, dim=-1, largest=True)[1], 1.0)
    return torch.where(mask > 0, t, torch.full_like(t, float("-inf"))).softmax(-1)


class FourMasks(nn.Module):
    """Four shares of the keys, summed with learned weights; over channels, as DRSformer does, or over tokens."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.qkv = nn.Conv2d(12, 36, 1)
        self.temperature = nn.Parameter(torch.rand(2, 1, 1))
        self.weights = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, _, _ = x.shape
        q, k, v = (y.reshape(batch, 2, width // 2, -1) for y in self.qkv(x).chunk(3, dim=1))
        if not self.channels:
            q, k, v = q.mT, k.mT, v.mT
        t = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * self.temperature
        shares = shares_of(t.shape[-1])
        parts = [selected(t, k) @ v * w for k, w in zip(shares, self.weights, strict=True)]
        return parts[0] + parts[1] + parts[2] + parts[3]


def shares_of(n: int) -> list[int]:
    return [n // 2, n * 2 // 3, n * 3 // 4, n * 4 // 5]


@pytest.mark.parametrize(("channels", "asked"), [(True, False), (True, True), (False, False)])
def test_each_keeps_its_own(channels: bool, asked: bool) -> None:
    torch.manual_seed(0)
    model = FourMasks(channels).double()
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64, requires_grad=True)
    _, result, call = captured(model, (x,), Policy(axes=frozenset({"token", "channel"})) if asked else Policy())
    if channels and not asked:
        assert all(d.reason.startswith("attention over channels") for d in result.decisions)
        assert not result.changed
    else:
        found = [(d.site.axis, d.site.tier, d.topk, d.own) for d in result.decisions]
        axis, n = ("channel", 6) if channels else ("token", 20)
        assert found == [(axis, "scores-kept", k, True) for k in shares_of(n)]
    out, expected = call(x), model(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *model.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    for mine, right in zip(torch.autograd.grad(out.square().sum(), wanted), gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
