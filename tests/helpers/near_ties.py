"""A case -> the rows in which rounding may decide which key is the k-th, and what it has to keep all the same.

A computer adds the D products of a score in an order, and with a rounding, of its own; a matrix unit truncates where a
processor rounds.  Whatever it does, with `eps` the spacing of the accumulation type at 1,

    |s' - s| <= (D + 8) eps sum_d |q_d k_d| =: delta
    |t' - t| <= |t(s +- delta) - t(s)| + 4 eps max |t|

D additions, each off by eps of what it holds at most (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), 8
for operands split in parts; and a few roundings of the score expression.  A row whose k-th and next score are closer
than twice that is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.plain.reference import reference_scores

if TYPE_CHECKING:
    from oracles import Case


@dataclass(frozen=True)
class NearTies:
    """What rounding may do to the rows `[B, Hq, Nq]` of a case."""

    undecided: Tensor
    """Rows in which it may decide."""
    slack: Tensor
    """How far a score of the row may be from the exact one."""
    must: Tensor
    """`[B, Hq, Nq, Nk]`: keys that are kept all the same."""
    may: Tensor
    """Keys that may be kept."""

    def check(self, kept: Tensor) -> None:
        """Raises AssertionError unless a lowering kept what it must and nothing but what it may."""
        missing, surplus = (self.must & ~kept).sum(), (kept & ~self.may).sum()
        assert not missing, f"{int(missing)} keys are dropped that no rounding may drop"
        assert not surplus, f"{int(surplus)} keys are kept that no rounding may keep"


def near_ties(case: Case, tensors: Sequence[Tensor]) -> NearTies:
    """`tensors`: q, k, v, *captured."""
    q, k, _, *captured = (x.detach().double() if x.is_floating_point() else x for x in tensors)
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return reference_scores(q, k, captured, score=case.score, sizes=case.sizes)

    t = scores(q, k)
    selection = selection_of(case.select, case.grid, case.prefix, q.shape[2], k.shape[2])
    if selection is not None:
        at = torch.meshgrid(*map(torch.arange, t.shape), indexing="ij")
        allowed = selection.map(t.shape[1], at, selection.tables(q, k))
        t = t if allowed is None else torch.where(allowed, t, -torch.inf)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    delta = (case.head_dim + 8) * eps * (q.abs() @ keys.abs().transpose(-1, -2)).amax(-1, keepdim=True)
    # one feature more, which adds delta to every product of a row
    moved = (scores(torch.cat((q, x), -1), torch.cat((k, torch.ones_like(k[..., :1])), -1)) for x in (delta, -delta))
    largest = torch.stack(
        [torch.where(t > -torch.inf, x - t, 0.0).abs().nan_to_num(0.0, 0.0, 0.0).amax(-1) for x in moved]
    ).amax(0)
    slack = largest + 4 * eps * torch.where(t.isfinite(), t.abs(), 0.0).amax(-1)
    valid = t > -torch.inf
    if case.topk >= case.keys:
        return NearTies(torch.zeros_like(slack, dtype=torch.bool), slack, valid, valid)
    order = t.sort(-1, descending=True).values
    last, following = order[..., case.topk - 1], order[..., case.topk]
    undecided = (last - following <= 2 * slack) & (following > -torch.inf)
    reach = 2 * slack.unsqueeze(-1)
    must = valid & ((t > last.unsqueeze(-1) + reach) | ~undecided.unsqueeze(-1) & (t >= last.unsqueeze(-1)))
    may = valid & (t >= last.unsqueeze(-1) - reach * undecided.unsqueeze(-1))
    return NearTies(undecided, slack, must, may)
