"""Any strides: every tensor argument of every operator, in every lowering, gives the bits of its contiguous copy."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import torch
from strewn import strewn
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops

LOWERINGS = ("c", "aten", "reference", interpreted.NAME)
SCORE, WEIGHT = "where(c1[b, i, j], 0.5*s + c0[h, i, j], -oo) + c2[j // 2]", "p*c2[i // 4]"
SEEDS = range(8)


@pytest.fixture(autouse=True, scope="module")
def triton() -> Iterator[None]:
    with interpreted.triton_on_cpu("streaming"):
        yield


def copied(x: Any) -> Any:
    if isinstance(x, list):
        return [copied(y) for y in x]
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def check(run: Callable[..., Any], arguments: list[Any]) -> tuple[Tensor, ...]:
    # BLAS may round the products of a batch that is one matrix repeated another way
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "aten" in arguments else {"rtol": 0, "atol": 0}
    results, expected = run(*arguments), run(*map(copied, arguments))
    for x, y in zip(_flat(results), _flat(expected), strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance)
    return results  # type: ignore[no-any-return]


def _flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [z for y in x for z in _flat(y)]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_attention_and_its_backward(lowering: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    batch, heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((1, 2))
    queries, keys, dim, value_dim = rng.choice((1, 5, 17)), rng.choice((1, 6, 19)), 8, rng.choice((4, 16))
    if seed == len(SEEDS) - 1:
        keys = 0
    q, k, v = (
        strewn(rng, torch.randn(batch, h, n, d).to(dtype))
        for h, n, d in ((heads * group, queries, dim), (heads, keys, dim), (heads, keys, value_dim))
    )
    captured = [
        strewn(rng, torch.randn(heads * group, queries, keys)),
        strewn(rng, torch.rand(batch, queries, keys) < 0.8),
        strewn(rng, torch.randn(9).to(torch.float16)),
    ]
    rest = [SCORE, WEIGHT, rng.choice((1, 3, 7)), [], 0.25, strewn(rng, torch.tensor([5])), lowering]
    out, logsumexp, threshold = check(torch.ops.kvt.attention, [q, k, v, captured, *rest])
    grad_out = strewn(rng, torch.randn_like(out))
    saved = [strewn(rng, x, expand=False) for x in (out, logsumexp, threshold)]
    needs_grad = [True, True, True, True, False, True]
    arguments = [grad_out, q, k, v, captured, *saved, *rest[:-1], needs_grad, lowering]
    check(torch.ops.kvt.attention_backward, arguments)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_rows_that_vmap_repeats(lowering: str) -> None:
    # what a transform saves of a batch of one: every tensor with a stride of 0
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (7, 9, 9))
    rest = ["0.5*s", "p", 3, [], 0.0, None]
    saved = torch.ops.kvt.attention(q, k, v, [], *rest, lowering)
    grad_out = torch.randn(5, 2, 7, 8)
    q, k, v, *saved = (x.expand(5, *x.shape[1:]) for x in (q, k, v, *saved))
    assert all(x.stride(0) == 0 for x in saved)
    arguments = [grad_out, q, k, v, [], *saved, *rest, [True, True, True], lowering]
    check(torch.ops.kvt.attention_backward, arguments)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_jacobian_is_that_of_eager_code(batch: int) -> None:
    from kvt_compile.functional import topk_attention

    torch.manual_seed(1)
    q, k, v = (torch.randn(batch, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5))

    def dense(q: Tensor) -> Tensor:
        t = q @ k.transpose(-1, -2) * 0.5
        return t.masked_fill(t < t.topk(2).values.amin(-1, keepdim=True), -torch.inf).softmax(-1) @ v

    def ours(q: Tensor) -> Tensor:
        return topk_attention(q, k, v, topk=2)

    torch.testing.assert_close(torch.func.jacrev(ours)(q), torch.func.jacrev(dense)(q))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("seed", range(8))
def test_topk_softmax_and_its_backward(lowering: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = [rng.choice((1, 2, 5, 9)) for _ in range(rng.choice((0, 1, 2, 3, 4)))]
    if seed == 7:
        shape = [3, 0, 2]
    scores = strewn(rng, torch.randn(shape))
    dim = rng.randrange(-max(1, len(shape)), max(1, len(shape)))
    weights = check(torch.ops.kvt.topk_softmax, [scores, dim, 2, torch.float32, lowering])
    grad, saved = strewn(rng, torch.randn(shape)), strewn(rng, weights, expand=False)
    check(torch.ops.kvt.topk_softmax_backward, [grad, saved, dim, torch.float32, lowering])


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_without_rows_gradients_are_contiguous_too(lowering: str) -> None:
    q, k, v = torch.randn(0, 2, 3, 8), torch.randn(0, 2, 4, 8), torch.randn(0, 2, 4, 8)
    captured, rest = [torch.randn(4, 3).T], ["s + c0[i, j]", "p", 2, [], 0.0, None]
    saved = torch.ops.kvt.attention(q, k, v, captured, *rest, lowering)
    arguments = [torch.zeros(0, 2, 3, 8), q, k, v, captured, *saved, *rest, [True] * 4, lowering]
    check(torch.ops.kvt.attention_backward, arguments)
