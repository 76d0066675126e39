"""`given(function)`: maps, maps of regions and scores that a function returns, against masks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvt_compile
from kvt_compile import SelectionError, select

GRID, PREFIX, TOKENS = (5, 7), 2, 37


def qkv(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    shapes = (2, 4, TOKENS, 8), (2, kv_heads, TOKENS, 8), (2, kv_heads, TOKENS, 8)
    return tuple(torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes)  # type: ignore[return-value]


def same(mine: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(mine, expected)
    weight = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(x, inputs, weight) for x in (mine, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


TABLE = torch.rand(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.4
TABLE |= torch.eye(TOKENS, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(2, 4, 37, 37), (1, 1, 37, 37), (37, 37), (2, 1, 1, 37), (4, 37, 1), ()])
def test_a_map(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = TABLE[tuple(slice(0, n) for n in (1,) * (4 - len(shape)) + shape)].reshape(shape)
    mask = mask if shape else torch.ones((), dtype=torch.bool)
    bias = torch.randn(4, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    mine = kvt_compile.attention(q, k, v, select=select.given(lambda q, k: mask), attn_mask=bias)
    expected = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~mask, -torch.inf)).nan_to_num(0.0)
    if shape not in ((4, 37, 1),):  # whole rows without a key, where SDPA's gradients are NaN
        same(mine, expected, (q, k, v, bias))
    torch.testing.assert_close(mine, expected)


def by_hand(region: list[int], table: Tensor) -> Tensor:
    """`[B, H, N, N]` of a map of regions; tokens before the grid keep and are kept."""
    of = torch.tensor(region)
    mask = torch.ones(2, 4, TOKENS, TOKENS, dtype=torch.bool)
    mask[:, :, PREFIX:, PREFIX:] = table[:, :, of[:, None], of]
    return mask


@pytest.mark.parametrize("lowering", ["aten", "c"])
@pytest.mark.parametrize("size", [(2, 3), 1, (5, 4)])
def test_a_map_of_regions(size: Any, lowering: str) -> None:
    rows, columns = size if isinstance(size, tuple) else (size, size)
    counts = -(-5 // rows), -(-7 // columns)
    total = counts[0] * counts[1]
    region = [y // rows * counts[1] + x // columns for y in range(5) for x in range(7)]
    table = TABLE[:, :, :total, :total]
    q, k, v = qkv()
    mine = kvt_compile.attention(
        q, k, v, select=select.given(lambda q, k: table, size=size) | select.prefix(), grid=GRID, prefix=PREFIX,
        lowering=lowering,
    )  # fmt: skip
    same(mine, F.scaled_dot_product_attention(q, k, v, by_hand(region, table)), (q, k, v))


def test_scores_are_ranked_in_place_of_the_final_ones() -> None:
    q, k, v = qkv(kv_heads=2)
    scores = torch.randn(2, 4, TOKENS, TOKENS, dtype=torch.float64).round(decimals=1)  # some tie
    by_scores = select.given(lambda q, k: scores) & select.topk(5)
    mask = scores >= scores.topk(5).values[..., -1:]
    assert (mask.sum(-1) > 5).any()
    mine = kvt_compile.attention(q, k, v, select=by_scores, enable_gqa=True)
    same(mine, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), (q, k, v))
    exactly = select.given(lambda q, k: scores) & select.topk(5, ties="lowest")
    first = torch.zeros_like(mask).scatter_(-1, scores.sort(descending=True, stable=True).indices[..., :5], True)
    mine = kvt_compile.attention(q, k, v, select=exactly, enable_gqa=True)
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, first, enable_gqa=True))


def test_scores_are_ranked_within_what_the_rest_allows() -> None:
    q, k, v = qkv()
    scores = torch.randn(TOKENS, TOKENS)
    near = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() <= 4
    near[:5] |= torch.arange(TOKENS) < 9
    near[-5:] |= torch.arange(TOKENS) >= TOKENS - 9
    ranked = scores.masked_fill(~near & True, -torch.inf)
    for n in range(TOKENS):  # windows are shifted inward
        start = min(max(n - 4, 0), TOKENS - 9)
        ranked[n] = -torch.inf
        ranked[n, start : start + 9] = scores[n, start : start + 9]
    mask = ranked >= ranked.topk(3).values[..., -1:]
    chosen = select.window(9) & select.given(lambda q, k: scores) & select.topk(3)
    mine = kvt_compile.attention(q, k, v, select=chosen, grid=TOKENS)
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, mask))


def test_a_map_beside_other_selections() -> None:
    q, k, v = qkv()
    either = select.given(lambda q, k: TABLE) | select.sinks(2) | select.prefix(1)
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    mine = kvt_compile.attention(q, k, v, select=either & select.topk(6))
    mask = TABLE | (j < 2) | (i < 1) | (j < 1)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    kept = mask & (scores >= scores.topk(6).values[..., -1:])
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, kept))
    causal = kvt_compile.attention(q, k, v, select=select.given(lambda q, k: TABLE), is_causal=True)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(q, k, v, TABLE & (j <= i)))


class Learned(nn.Module):
    """Which keys to keep, by low-rank products of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 2, bias=False)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.down(q) @ self.down(k).mT


def test_a_module_chooses_and_no_gradient_goes_through_the_choice() -> None:
    q, k, v = (x.float().detach().requires_grad_() for x in qkv())
    module = Learned()
    chosen = select.given(module) & select.topk(4)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvt_compile.attention(q, k, v, select=chosen)

    scores = module(q, k)
    mask = scores >= scores.topk(4).values[..., -1:]
    out = run(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))
    out.sum().backward()
    assert module.down.weight.grad is None
    assert q.grad is not None


def test_what_keeps_every_key_is_dense() -> None:
    q, k, v = qkv()
    for chosen in (
        select.given(lambda q, k: torch.ones(1, dtype=torch.bool)),
        select.given(lambda q, k: q @ k.mT) & select.topk(1.0),
        select.given(lambda q, k: torch.ones(2, 2, dtype=torch.bool), size=(5, 4)) | select.prefix(),
    ):
        mine = kvt_compile.attention(q, k, v, select=chosen, grid=GRID, prefix=PREFIX)
        same(mine, F.scaled_dot_product_attention(q, k, v), (q, k, v))


@pytest.mark.parametrize(
    ("function", "joined", "message"),
    [
        (lambda q, k: torch.randn(TOKENS, TOKENS), "", "write given"),
        (lambda q, k: torch.randn(TOKENS, TOKENS), "mass(0.5)", "write given"),
        (lambda q, k: torch.ones(3, 3, dtype=torch.bool), "", "does not broadcast"),
        (lambda q, k: torch.ones(TOKENS, TOKENS, dtype=torch.int64), "", "expected a bool map"),
        (lambda q, k: None, "", "returned NoneType"),
    ],
)
def test_what_a_function_may_not_return(function: Any, joined: str, message: str) -> None:
    chosen = select.given(function)
    with pytest.raises(SelectionError, match=message):
        kvt_compile.attention(*qkv(), select=chosen & select.parse(joined) if joined else chosen)


def test_where_a_function_cannot_stand() -> None:
    chosen = select.given(lambda q, k: TABLE)
    q, k, v = qkv()
    with pytest.raises(SelectionError, match="let the function keep those keys too"):
        kvt_compile.attention(q, k, v, select=chosen | select.window(3))
    with pytest.raises(SelectionError, match="of 4 dimensions"):
        kvt_compile.attention(q[0], k[0], v[0], select=chosen)
    with pytest.raises(SelectionError, match="cannot be called"):
        select.given(3)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="is no text"):
        select.parse("given(choose) | prefix")
    alone = select.given(lambda q, k: torch.ones(2, 2, dtype=torch.bool), size=(5, 4))
    with pytest.raises(SelectionError, match="keeps no key for the 2 tokens before the grid"):
        kvt_compile.attention(q, k, v, select=alone, grid=GRID, prefix=PREFIX)


def test_torch_compile_follows_a_call_with_a_function() -> None:
    q, k, v = qkv()
    chosen = select.given(Learned().double()) & select.topk(4)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvt_compile.attention(q, k, v, select=chosen)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    same(compiled(q, k, v), run(q, k, v), (q, k, v))
    one = tuple(x[:1] for x in (q, k, v))
    torch.testing.assert_close(compiled(*one), run(*one))


def test_a_function_is_equal_to_itself_alone() -> None:
    one, other = Learned(), Learned()
    assert select.given(one) == select.given(one)
    assert select.given(one.forward) == select.given(one.forward)
    assert hash(select.given(one.forward)) == hash(select.given(one.forward))
    assert select.given(one) & select.topk(4) == select.given(one) & select.topk(4)
    for different in (select.given(other), select.given(one, size=2), select.given(other.forward), select.sinks(1)):
        assert select.given(one) != different
        assert select.given(one.forward) != different
