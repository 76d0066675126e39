"""Spellings with writes: in-place operations, slices, views.  What is written is part of the meaning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spellings import B, D, H, N, spelling
from torch import Tensor

# ---- the scores as a whole -------------------------------------------------------------------------------------------


@spelling("fused", score="0.5*s")
def mul_(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(0.5)
    return scores.softmax(-1) @ v


@spelling("fused", score="0.5*s")
def imul_and_itruediv(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 2
    scores /= 4
    return scores.softmax(-1) @ v


@spelling("fused", score="0.5*s + c0[h, i, j] - 1.0")
def iadd_and_isub(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    scores += m.p("bias", H, N, N)
    scores -= 1
    return scores.softmax(-1) @ v


@spelling("fused", score="where(c0[i, j], -1000000000.0, s)")
def masked_fill_(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(m.b("mask", lambda: torch.ones(N, N).triu(1).bool()), -1e9)
    return scores.softmax(-1) @ v


@spelling("fused")  # Dynamo of torch 2.11 multiplies the bias by alpha first
def chained_writes(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).add_(m.p("bias", N, N), alpha=2).softmax(-1) @ v


@spelling("fused")
def clamp_and_tanh_(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).clamp_(-2, 2)
    torch.tanh_(scores)
    return scores.softmax(-1) @ v


@spelling("fused", score="s + 0.1")
def filled_into_an_empty_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.new_empty(B, H, N, N)
    scores[...] = q @ k.mT
    scores += 0.1
    return scores.softmax(-1) @ v


@spelling("fused", score="s")
def copied_into_an_empty_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.new_zeros(B, H, N, N)
    scores.copy_(q @ k.mT)
    return scores.softmax(-1) @ v


# ---- slices ----------------------------------------------------------------------------------------------------------


@spelling("fused", score="where(ge(i, 1), where(ge(j, 1), 0.5*s + c0[b, h, i - 1, j - 1], 0.5*s), 0.5*s)")
def mvit_v2(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MViT v2: relative positions computed from q are added to all but the class token's row and column, by
    `attn[:, :, 1:, 1:] += ...`, which leaves no edge in the graph."""
    scores = (q * 0.5) @ k.mT
    scores[:, :, 1:, 1:] += torch.einsum("bhid,ijd->bhij", q[:, :, 1:], m.p("table", N - 1, N - 1, D))
    return scores.softmax(-1) @ v


@spelling("fused")
def mvit_v2_assigned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * 0.5) @ k.mT
    scores[:, :, 1:, 1:] = (
        scores[:, :, 1:, 1:].view(B, H, 2, 2, 2, 2) + m.p("rows", H, 2, 2, 2, 1) + m.p("columns", H, 2, 2, 1, 2)
    ).view(B, H, N - 1, N - 1)
    return scores.softmax(-1) @ v


@spelling("fused", score="where(ge(j, 2), s + c0[h, i, j - 2], s)")
def slice_of_the_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 2:] += m.p("bias", H, N, N - 2)
    return scores.softmax(-1) @ v


@spelling("fused")
def slice_added_by_a_method(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, :2].add_(m.p("bias", N))
    return scores.softmax(-1) @ v


@spelling("fused")
def one_row(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 0] = m.p("row", H, N)
    return scores.softmax(-1) @ v


@spelling("fused", score="where(lt(i, 1), s + 1.5, s)")
def one_row_added_to(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 0] += 1.5
    return scores.softmax(-1) @ v


@spelling("fused", score="where(lt(j, 1), s*c0[h, i, 0], s)")
def one_column_multiplied(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., :1] *= m.p("column", H, N, 1)
    return scores.softmax(-1) @ v


@spelling("scores-kept")
def one_row_copied_to_another(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 0] = scores[:, :, 1]
    return scores.softmax(-1) @ v


@spelling("fused")
def one_column_filled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., -1] = float("-inf")
    return scores.softmax(-1) @ v


@spelling("fused")
def slices_one_after_the_other(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, 1:] *= 0.5
    scores[:, :, 1:3] += m.p("bias", 2, N)
    scores[..., :2] -= 0.3
    return scores.softmax(-1) @ v


@spelling("fused")
def narrowed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.narrow(-1, 1, 3).mul_(m.p("gain", 3))
    return scores.softmax(-1) @ v


# ---- views -----------------------------------------------------------------------------------------------------------


@spelling("fused")
def written_through_a_transpose(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mT.add_(m.p("bias", N, 1))
    return scores.softmax(-1) @ v


@spelling("fused")
def written_through_a_reshape(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.view(B * H, N, N).mul_(0.5).add_(m.p("bias", N, N))
    return scores.softmax(-1) @ v


@spelling("fused")
def view_read_after_the_base_was_written(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    view = scores.flatten(0, 1)
    scores += m.p("bias", H, N, N)
    return view.softmax(-1).view(B, H, N, N) @ v


@spelling("fused")
def base_read_after_a_view_was_written(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    rows = scores.permute(0, 2, 1, 3)
    rows[:, 0] = 0.25
    return scores.softmax(-1) @ v


@spelling("fused")
def view_of_a_view(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    inner = scores.mT[:, :, 1:]
    inner[..., :2] *= 3
    return scores.mT.mT.softmax(-1) @ v


@spelling("fused", score="s")
def a_copy_was_written(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`clone` and a copying reshape are no views."""
    scores = q @ k.mT
    scores.clone().mul_(5)
    scores.mT.reshape(-1).zero_()
    return scores.softmax(-1) @ v


@spelling("refused")
def diagonal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A view no slice expresses: not followed, so not fused."""
    scores = q @ k.mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    return scores.softmax(-1) @ v


@spelling("fused", score="where(c0[i, j], -1000000000.0, s)")
def by_boolean_index(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, m.b("mask", lambda: torch.ones(N, N).triu(1).bool())] = -1e9
    return scores.softmax(-1) @ v


@spelling("fused", score="where(c0[b, h, i], -1.0, s)")
def rows_by_boolean_index(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[m.b("rows", lambda: torch.rand(B, H, N) < 0.3)] = -1.0
    return scores.softmax(-1) @ v


@spelling("fused", score="where(c0[i], -1.0, s)")
def rows_by_boolean_index_after_an_ellipsis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., m.b("rows", lambda: torch.rand(N) < 0.3), :] = -1.0
    return scores.softmax(-1) @ v


@spelling("fused", score="where(gt(s, 0.5), -2.0, s)")
def where_the_scores_are_large(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[scores > 0.5] = -2.0
    return scores.softmax(-1) @ v


@spelling("scores-kept", reason="setitem between the two products")
def several_numbers_by_boolean_index(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many numbers as the mask has elements: which goes where depends on the mask."""
    scores = q @ k.mT
    scores[:, :, m.b("mask", lambda: torch.eye(N).bool())] = m.p("numbers", N)
    return scores.softmax(-1) @ v


@spelling("scores-kept", reason="setitem between the two products")
def diagonal_by_index(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reformer: no token attends to itself."""
    scores, i = q @ k.mT, torch.arange(N)
    scores[:, :, i, i] = -5e4
    return scores.softmax(-1) @ v


# ---- something else is written ---------------------------------------------------------------------------------------


@spelling("scores-kept", reason="overwritten", trainable=False)
def q_written_after_its_product(m: Any, x: Tensor) -> Tensor:
    """The product used the old value."""
    q, k, v = (torch.sin(y) for y in m.heads(x))
    scores = q @ k.mT
    q.zero_()
    return scores.softmax(-1) @ v + q


@spelling("fused", trainable=False)
def v_written_before_its_product(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.sin(y) for y in m.heads(x))
    weights = (q @ k.mT).softmax(-1)
    v += 1
    return weights @ v


@spelling("scores-kept", reason="overwritten", trainable=False)
def bias_written_after_it_was_added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The captured tensor holds something else when the fused kernel would run."""
    bias = F.gelu(m.p("bias", H, N, N))
    scores = q @ k.mT + bias
    bias.zero_()
    return scores.softmax(-1) @ v + bias.sum()


@spelling("fused")
def bias_written_before_it_is_added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = m.p("bias", H, N, N) * 1.0
    bias[:, 0] = 0
    bias.mul_(2)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("scores-kept", trainable=False)
def scores_written_after_the_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    weights = scores.softmax(-1)
    scores.mul_(2)
    return weights @ v, scores


@spelling("scores-kept", reason="read by")
def scores_read_before_they_are_written(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    raw = scores.sum()
    scores *= 0.5
    return scores.softmax(-1) @ v, raw


@spelling("scores-kept", reason="read by")
def view_read_elsewhere(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    first = scores[:, :, 0]
    scores[..., 0] += 1
    return scores.softmax(-1) @ v, first


# ---- the weights -----------------------------------------------------------------------------------------------------


@spelling("fused", trainable=False)
def weights_scaled_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights *= m.p("gate", H, 1, 1)
    return weights @ v


@spelling("fused", trainable=False)
def weights_masked_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v


@spelling("scores-kept", reason="revive", trainable=False)
def weights_filled_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0.1
    return weights @ v


@spelling("scores-kept", trainable=False)
def weights_revived_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0.5
    return weights @ v
