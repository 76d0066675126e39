"""What runs outside of every graph is named, where there is a single graph too, and inside of composites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvt_compile

C, N = 8, 5


class Broken(nn.Module):
    """A layer that is captured, and something that is not."""

    def __init__(self, inner: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(C, C), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.layer(x))

    @torch._dynamo.disable
    def outside(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.MultiheadAttention):
            out: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return out
        return (x @ x.mT).softmax(-1) @ x if self.inner is None else self.inner(x)


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (None, "softmax"),
        (nn.MultiheadAttention(C, 2, batch_first=True), "multi_head_attention_forward"),
        (nn.TransformerEncoderLayer(C, 2, 16, batch_first=True), "multi_head_attention_forward"),
    ],
    ids=["Tensor.softmax", "MultiheadAttention", "TransformerEncoderLayer"],
)
def test_named(inner: nn.Module | None, name: str) -> None:
    report = kvt_compile.explain(Broken(inner), torch.randn(2, N, C))
    assert not report.sites
    (refusal,) = report.refusals
    assert refusal.node == name
    assert "outside every captured graph" in refusal.reason


def test_neighbour_that_has_none() -> None:
    assert not kvt_compile.explain(Broken(nn.Linear(C, C)), torch.randn(2, N, C)).refusals


def test_neighbour_that_is_captured() -> None:
    model = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True)
    report = kvt_compile.explain(model, torch.randn(2, N, C))
    assert [site.outcome for site in report.sites] == ["fused"]
    assert not report.refusals


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers(layout: torch.layout, changes: bool) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(C, C)
            self.register_buffer("edges", torch.eye(N).to_sparse(layout=layout))

        def forward(self, x: Tensor) -> Tensor:
            q = self.layer(x)
            out = (q @ q.mT).softmax(-1) @ q + torch.stack([torch.sparse.mm(self.edges, y) for y in x])
            if changes:
                self.edges = 2 * self.edges
            return out

    model = Graph()
    report = kvt_compile.explain(model, torch.randn(2, N, C))
    assert [site.outcome for site in report.sites] == ["fused"]
    torch.testing.assert_close(model.edges.to_dense(), torch.eye(N))
