"""Scores of whole rows -> thresholds, and from them weights: which keys a row keeps, and how much each counts.

tau = k-th largest of t        kept  <=>  t >= tau and t > -inf        (ties at tau are all kept)
threshold in (largest dropped, tau]: midway where a number lies there, so that a score recomputed with another
rounding still falls on the same side
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_threshold(t: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """t `[..., Nk]` float32 or float64, Nk >= 1, topk >= 1  ->  (maximum, threshold), each `[..., 1]`.

    The threshold is -inf where every valid key is kept, and NaN where dense softmax would make the row NaN (a NaN in
    it, or +inf as its maximum).
    """
    maximum = t.amax(-1, keepdim=True)
    if topk >= t.shape[-1]:
        threshold = torch.full_like(maximum, -torch.inf)
    else:
        # Not sorted, then the smallest: on a CPU half the time of a sorted topk (13 against 40 ms at 256 x 4096) and
        # less than kthvalue, which besides raises under torch.use_deterministic_algorithms on a GPU.
        tau = t.topk(topk, -1, sorted=False).values.amin(-1, keepdim=True)
        # Not the last of a topk(k + 1): with ties at tau that is tau itself, and no guard would be left.
        below = torch.where(t >= tau, -torch.inf, t).amax(-1, keepdim=True)
        threshold = between(below, tau)
    return maximum, threshold.masked_fill_(maximum.isnan() | (maximum == torch.inf), torch.nan)


def row_threshold_by_mass(t: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """As `row_threshold`, where the fewest best keys are kept whose softmax mass is at least `mass`."""
    maximum = t.amax(-1, keepdim=True)
    ranked = t.sort(-1, descending=True).values
    before = ranked.softmax(-1).cumsum(-1)
    # kept while what stands before is not enough; rounding of the sum may leave 1.0 out of reach: then all are kept
    enough = torch.cat([torch.zeros_like(maximum), before[..., :-1]], -1) >= mass
    tau = torch.where(enough, torch.inf, ranked).amin(-1, keepdim=True)
    threshold = between(torch.where(t < tau, t, -torch.inf).amax(-1, keepdim=True), tau)
    return maximum, threshold.masked_fill(maximum.isnan() | (maximum == torch.inf), torch.nan)


def between(below: Tensor, tau: Tensor) -> Tensor:
    """A threshold midway between the largest dropped and the smallest kept score where a number lies there, else the
    latter; -inf where nothing valid is dropped."""
    middle = 0.5 * tau + 0.5 * below
    return torch.where((middle > below) & (middle < tau), middle, tau).masked_fill_(below == -torch.inf, -torch.inf)


def kept_scores(t: Tensor, threshold: Tensor) -> Tensor:
    """t where a key is kept, -inf elsewhere and all over a row whose threshold is NaN."""
    return torch.where(t >= threshold, t, -torch.inf)


def without_late_ties(t: Tensor, threshold: Tensor, topk: int) -> Tensor:
    """Scores with -inf instead of all but topk of those that reach a row's threshold: of keys tied at the smallest kept
    score, those with the larger index go.  The same before and after a forward, whose threshold is that score then."""
    kept = (t >= threshold) & (t > -torch.inf)  # -inf where only masked keys are dropped: all others may be tied
    smallest = torch.where(kept, t, torch.inf).amin(-1, keepdim=True)
    tied = kept & (t == smallest)
    room = topk - (kept & ~tied).sum(-1, keepdim=True)
    return torch.where(tied & (tied.cumsum(-1) > room), -torch.inf, t)


def softmax(t: Tensor, topk: int, mass: float = 1.0, lowest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """t `[..., Nk]` -> (weights `[..., Nk]`, logsumexp `[..., 1]`, threshold `[..., 1]`).

    mass: below 1 the keys are kept that `row_threshold_by_mass` says; lowest: exactly topk, the first of tied ones."""
    maximum, threshold = row_threshold_by_mass(t, mass) if mass < 1.0 else row_threshold(t, topk)
    if lowest:
        t = without_late_ties(t, threshold, topk)
    weights = kept_scores(t, threshold).sub_(_finite(maximum)).exp_()
    total = weights.sum(-1, keepdim=True).masked_fill_(threshold.isnan(), torch.nan)
    return weights.div_(total.masked_fill(total == 0.0, 1.0)), maximum + total.log(), threshold


def weights_again(t: Tensor, logsumexp: Tensor, threshold: Tensor) -> Tensor:
    """Backward: t `[..., Nk]` and what the forward saved of its rows `[..., 1]` -> weights.

    Divided by their own sum: logsumexp rounds at its own size, and beside a mask of -1e9 nothing is left of log(n).
    """
    p = kept_scores(t, threshold).sub_(_finite(logsumexp)).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total.masked_fill_(total == 0.0, 1.0))


def _finite(rows: Tensor) -> Tensor:
    """0 for -inf, which rows without a valid key have: -inf - -inf would be NaN.  NaN stays."""
    return rows.masked_fill(rows == -torch.inf, 0.0)
