"""What the rewrite leaves behind: no dead copies, the model's dtypes, the model's memory order."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

import kvt_compile

FORCED = {"topk": 1.0, "force_rewrite": True}


def targets(module: nn.Module) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op in ("call_function", "call_method")]  # type: ignore[union-attr, operator]


class Grouped(nn.Module):
    """Grouped-query attention the way transformers writes it: keys and values repeated before the product."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, x.shape[2], 8) for x in (k, v))
        scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v


def test_repeated_keys_and_scaled_queries_are_gone() -> None:
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    result = kvt_compile.rewrite(Grouped(), q, k, v, **FORCED)
    (site,) = result.report.sites
    assert (site.heads, site.kv_heads) == (4, 2)
    names = targets(result.module)
    assert not [name for name in names if name in ("expand", "transpose", "matmul") or "mul" in name]
    assert sum("kvt.attention" in name for name in names) == 1
    torch.testing.assert_close(result.module(q, k, v), Grouped()(q, k, v))


class MemoryOrder(nn.Module):
    """`view` after the product works only in the memory order the einsum gives."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).contiguous().view(q.shape[0], q.shape[1], -1)


def test_the_result_has_the_memory_order_of_the_original() -> None:
    q, k, v = (torch.randn(2, 5, 3, 4) for _ in range(3))
    result = kvt_compile.rewrite(MemoryOrder(), q, k, v, **FORCED)
    assert result.report.counts["fused"] == 1
    torch.testing.assert_close(result.module(q, k, v), MemoryOrder()(q, k, v))


class Normed(nn.Module):
    """Layer norm leaves queries, keys and values in float32 under autocast; the products lower them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (nn.functional.layer_norm(x * n, (8,)) for n in (1, 2, 3))
        return (q @ k.mT).softmax(-1) @ v


def test_autocast_decides_the_dtype_of_the_result() -> None:
    dtypes = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        from kvt_compile.passes.decide import Policy
        from kvt_compile.passes.pipeline import run_passes

        assert run_passes(gm, Policy(topk=1.0, force_rewrite=True)).changed
        dtypes.extend(
            n.meta["example_value"].dtype
            for n in gm.graph.nodes
            if n.target is operator.getitem and "kvt" in str(n.args[0].target)  # type: ignore[union-attr]
        )
        return gm.forward

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(Normed(), backend=backend)(torch.randn(2, 5, 8))
        assert out.dtype == Normed()(torch.randn(2, 5, 8)).dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16]


class Overwritten(nn.Module):
    """A softmax by hand whose weights are read by somebody else and then overwritten."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        e = (q @ k.mT).exp()
        weights = e / e.sum(-1, keepdim=True)
        total = weights.sum(-2)
        weights.mul_(0.5)
        return weights @ v, total


def test_weights_may_be_overwritten_after_a_scores_kept_softmax() -> None:
    inputs = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    result = kvt_compile.rewrite(Overwritten(), *inputs, **FORCED)
    assert result.report.counts["scores-kept"] == 1
    for found, expected in zip(result.module(*inputs), Overwritten()(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    result.module(*inputs)[0].sum().backward()
    assert all(x.grad is not None for x in inputs)
