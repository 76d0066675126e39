"""Spellings that use a part of the scores or of the weights: some rows, some keys, some heads, in any order."""

from __future__ import annotations

from typing import Any

from spellings import N, spelling
from torch import Tensor


@spelling("fused", score="s")
def rows_but_the_first(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, :, 1:].softmax(-1) @ v


@spelling("fused", score="s")
def rows_but_the_last(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The slice starts at 0: nothing but its size tells it from the whole."""
    return (q @ k.mT)[:, :, :-1].softmax(-1) @ v


@spelling("fused", score="s")
def rows_of_the_weights(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[:, :, 2:5] @ v


@spelling("fused", score="s")
def every_third_row(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, :, 1::3].softmax(-1) @ v


@spelling("scores-kept", reason="flip between the two products is not pointwise")
def rows_backwards(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).flip(2).softmax(-1) @ v


@spelling("fused", score="s")
def scores_of_one_row(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, :, 3].softmax(-1).unsqueeze(2) @ v


@spelling("fused", score="s")
def one_row_that_stays_an_axis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, :, 3:4].softmax(-1) @ v


@spelling("fused", score="s")
def keys_but_the_first(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[..., 1:].softmax(-1) @ v[:, :, 1:]


@spelling("scores-kept", reason="flip between the two products is not pointwise")
def keys_backwards(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).flip(-1).softmax(-1) @ v


@spelling("fused", score="s + c0[0, h + 1, i + 1, j]")
def second_head_with_its_bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + m.p("bias", 1, q.shape[1], N, N)
    return scores[:, 1:, 1:].softmax(-1) @ v[:, 1:]


@spelling("fused")
def one_head(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, 1].softmax(-1) @ v[:, 1]


@spelling("scores-kept", reason="leaves out a part of the softmax axis")
def weights_of_some_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The neighbour: here the softmax runs over all keys, so its weights do not sum to one."""
    return (q @ k.mT).softmax(-1)[..., 1:] @ v[:, :, 1:]
