"""Views made without grad: torch says they need a gradient, and so does what a rewritten model computes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

FORCED = {"topk": 1.0, "force_rewrite": True}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def all_three(x: Tensor) -> Tensor:
    with torch.no_grad():
        q = x.transpose(1, 2)
    return attend(q, q, q)


def chunks(x: Tensor) -> Tensor:
    with torch.no_grad():
        q, k, v = x.unflatten(-1, (3, 4)).unbind(-2)
    return attend(q, k, v)


def beside_a_product(x: Tensor) -> Tensor:
    y = x.sin()
    with torch.no_grad():
        q = y[:, :, :4].view(2, 5, 4)
        k = y[:, :, 4:8] * 2
    return attend(q, k, k)


def a_query_that_is_used_elsewhere(x: Tensor) -> Tensor:
    with torch.no_grad():
        q = x[..., :6]
    return attend(q, q, q) + x[..., 6:]


def computed(x: Tensor) -> Tensor:
    with torch.no_grad():
        q = x.transpose(1, 2) * 2
    return attend(q, q, q)


def copied(x: Tensor) -> Tensor:
    with torch.no_grad():
        q = x.transpose(1, 2).contiguous()
    return attend(q, q, q)


def detached(x: Tensor) -> Tensor:
    with torch.no_grad():
        q = x.detach().transpose(1, 2)
    return attend(q, q, q)


def weights_without(x: Tensor) -> Tensor:
    with torch.no_grad():
        w = (x @ x.mT).softmax(-1)
    return w @ x.detach()


VIEWS = [all_three, chunks, beside_a_product, a_query_that_is_used_elsewhere]
CUTS = [computed, copied, detached, weights_without]


@pytest.mark.parametrize("model", [*VIEWS, *CUTS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", ["compiled", "rewritten"])
def test_what_needs_a_gradient_is_what_the_model_says(model: Callable[[Tensor], Tensor], way: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    data = torch.randn(2, 5, 12)
    if way == "compiled":
        torch.compiler.reset()
        run: Callable[[Tensor], Tensor] = torch.compile(Model(), backend="kvt", options={**FORCED, "then": "aot_eager"})
    else:
        result = kvt_compile.rewrite(Model(), data.clone().requires_grad_(), unknown_attention="rewrite", **FORCED)
        # an export makes what runs without grad a graph of its own: the product is in another one than the softmax
        assert result.report.counts["fused"] == (model is not weights_without)
        run = result.module
    results = []
    for each in (Model(), run):
        x = data.clone().requires_grad_()
        out = each(x)
        assert out.requires_grad == (model in VIEWS)
        if out.requires_grad:
            out.square().sum().backward()
        results.append((out.detach(), x.grad))
    (out, grad), (expected, expected_grad) = results[1], results[0]
    torch.testing.assert_close(out, expected)
    assert (grad is None) == (expected_grad is None)
    if grad is not None:
        torch.testing.assert_close(grad, expected_grad)
