"""The counting way: queries travel, keys stay where they are, and each rank counts its own keys.

    tau_i = topk-th largest of t_i:  its bits from the top, DIGIT at a time: how many of my keys have this prefix and
                                     which next digit, summed over ranks, says the digit; topk shrinks by those above
    threshold, logsumexp             maxima and sums over ranks, one number a row each
    out = sum over j of w_ij v_j     each rank over its own keys, then added up

A pass computes its scores anew, a tile at a time, so that memory stays O(N): 4 + 32 / DIGIT passes in float32.  Every
one computes a score by the same product at the same place, so its bits are the same in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvt_compile.kernels.dropout import place_of_draws
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative
from kvt_compile.kernels.language.evaluate import scatter
from kvt_compile.kernels.language.grid import Environment
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.plain import select
from kvt_compile.kernels.plain.aten import Algorithm, slopes, through
from kvt_compile.kernels.plain.tiling import Heads, Tile
from kvt_compile.parallel import coordinates
from kvt_compile.parallel.context.captured import Cut
from kvt_compile.parallel.context.gathering import narrowed
from kvt_compile.parallel.context.order import Part
from kvt_compile.parallel.context.ring import Ring

DIGIT = 4
"""Bits of a score that a pass settles, by 2**DIGIT counts a row."""


@dataclass(frozen=True, eq=False)
class _Scores:
    """One tile of final scores `[b, hq, i, some of this rank's keys]`."""

    run: Algorithm
    piece: Heads
    part: Tile
    own: Part
    keys: Tensor
    values: Tensor
    env: Environment
    t: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The tile's part of a number a row, `[B, Hq, N]` -> `[b, hq, i, 1]`, a view."""
        return self.part.rows(x.unsqueeze(-1))


class Counting:
    """One call: all rows of the sequence, this rank's keys."""

    def __init__(self, call: AttentionCall, ring: Ring, cut: Cut) -> None:
        self.ring, self.cut = ring, cut
        q = ring.gather(call.q, 2)
        captured = [ring.gather(x, cut.rows[n]) if n in cut.rows else x for n, x in enumerate(call.captured)]
        self.call = dataclasses.replace(call, q=q, captured=captured)
        self.topk = min(call.asked, call.keys * ring.ranks)
        self.accumulate = call.spec.accumulate

    def number(self, start: float) -> Tensor:
        """A number for every row of the sequence."""
        return torch.full(self.call.rows, start, dtype=self.accumulate, device=self.call.q.device)

    def tiles(self) -> Iterator[_Scores]:
        """Every tile, its scores computed anew."""
        call, spec = self.call, self.call.spec
        for own in self.ring.parts(call.keys):
            (score, weight), sizes = coordinates.of_shard(
                (spec.score, spec.weight), {"j": own.first}, self.cut.local("j"), call.sizes
            )
            first, *per = place_of_draws(call.rows, call.keys * self.ring.ranks, call.part)
            run = Algorithm(
                dataclasses.replace(
                    call,
                    spec=dataclasses.replace(spec, score=score, weight=weight, sizes=len(sizes)),
                    k=narrowed(call.k, 2, own),
                    v=narrowed(call.v, 2, own),
                    captured=[narrowed(x, self.cut.keys.get(n), own) for n, x in enumerate(call.captured)],
                    sizes=sizes,
                    part=(first + own.first, *per),
                )
            )
            for piece, keys, values in run.pieces():
                for part in piece.tiles():
                    env, t = run.scores(part, keys)
                    yield _Scores(run, piece, part, own, keys, values, env, t)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(out, logsumexp, threshold) of this rank's rows."""
        maximum = self.number(-torch.inf)
        for x in self.tiles():
            largest = x.t.amax(-1, keepdim=True).nan_to_num(torch.inf, torch.inf, -torch.inf)
            x.rows(maximum).copy_(torch.maximum(x.rows(maximum), largest))
        threshold = self._threshold(self.ring.maximum(maximum))
        total = self.number(0.0)
        for x in self.tiles():
            x.rows(total).add_(_exponentials(x, maximum, threshold).sum(-1, keepdim=True))
        self.ring.sum(total).masked_fill_(threshold.isnan(), torch.nan)
        out = torch.zeros((*self.call.rows, self.call.v.shape[3]), dtype=self._value_dtype, device=self.call.q.device)
        for x in self.tiles():
            p = _exponentials(x, maximum, threshold) / x.rows(total.masked_fill(total == 0.0, 1.0))
            w = x.part.group(x.run.weights(x.env, p).to(x.values.dtype))
            x.part.rows(out).add_(x.part.ungroup(w @ x.values))
        mine = self.ring.scatter_sum(out, 2).to(self.call.v.dtype)
        return mine, self._mine(maximum + total.log()), self._mine(threshold)

    def _threshold(self, maximum: Tensor) -> Tensor:
        """tau of every row, moved towards the largest dropped score as every lowering does."""
        broken = maximum == torch.inf
        if self.topk >= self.call.keys * self.ring.ranks:
            return self.number(-torch.inf).masked_fill_(broken, torch.nan)
        tau, below = self._largest(), self.number(-torch.inf)
        for x in self.tiles():
            under = torch.where(x.t >= x.rows(tau), -torch.inf, x.t).amax(-1, keepdim=True)
            x.rows(below).copy_(torch.maximum(x.rows(below), under.nan_to_num(-torch.inf, torch.inf, -torch.inf)))
        return select.between(self.ring.maximum(below), tau).masked_fill_(broken, torch.nan)

    def _largest(self) -> Tensor:
        """The topk-th largest score of every row, digit by digit."""
        bits, radix = (64 if self.accumulate == torch.float64 else 32), 2**DIGIT
        left = torch.full(self.call.rows, self.topk, dtype=torch.int64, device=self.call.q.device)
        prefix = torch.zeros_like(left)
        for shift in range(bits - DIGIT, -1, -DIGIT):
            counts = torch.zeros((*self.call.rows, radix), dtype=torch.int32, device=left.device)
            for x in self.tiles():
                u = _ordered(x.t)
                digit = (u >> shift) & (radix - 1)
                if shift + DIGIT < bits:  # those that share the digits found so far
                    digit = torch.where((u >> (shift + DIGIT)) == x.rows(prefix), digit, radix)
                found = [(digit == d).sum(-1, dtype=torch.int32) for d in range(radix)]
                x.part.rows(counts).add_(torch.stack(found, -1))
            above = self.ring.sum(counts).long().flip(-1).cumsum(-1)  # of the largest digits first
            place = (above < left.unsqueeze(-1)).sum(-1, keepdim=True).clamp_(max=radix - 1)
            before = above.gather(-1, (place - 1).clamp_(min=0)).where(place > 0, 0)
            left -= before.squeeze(-1)
            prefix = (prefix << DIGIT) | (radix - 1 - place.squeeze(-1))
            if bits == 64 and shift == bits - DIGIT:
                prefix = torch.where(prefix >= radix // 2, prefix - radix, prefix)  # as an arithmetic shift has it
        return _scores_of(prefix, self.accumulate)

    # ---- backward --------------------------------------------------------------------------------------------------

    def backward(self, grad_out: Tensor, logsumexp: Tensor, threshold: Tensor) -> Gradients:
        """(dq, dk, dv, dcaptured) of what this rank has."""
        call, spec, ring = self.call, self.call.spec, self.ring
        grad_out, logsumexp, threshold = (ring.gather(x, 2) for x in (grad_out, logsumexp, threshold))
        total, delta = self.number(0.0), self.number(0.0)
        for x in self.tiles():
            x.rows(total).add_(_exponentials(x, logsumexp, threshold).sum(-1, keepdim=True))
        ring.sum(total).masked_fill_(total == 0.0, 1.0)
        for x in self.tiles():
            p, _, dp, _ = self._softmax_again(x, logsumexp, threshold, total, grad_out)
            x.rows(delta).add_((p * dp).sum(-1, keepdim=True))
        ring.sum(delta)
        inputs = (call.q, call.k, call.v, *call.captured)
        sums = [
            torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, self.accumulate), device=x.device) if need else None
            for x, need in zip(inputs, spec.needs_grad, strict=True)
        ]
        for x in self.tiles():
            self._accumulate(x, self._softmax_again(x, logsumexp, threshold, total, grad_out), delta, grad_out, sums)
        travels = {0: 2} | {slot + 3: dim for slot, dim in self.cut.rows.items()}
        full = [
            None if x is None else (ring.scatter_sum(x, travels[n]) if n in travels else x).to(inputs[n].dtype)
            for n, x in enumerate(sums)
        ]
        return full[0], full[1], full[2], full[3:]

    def _softmax_again(
        self, x: _Scores, logsumexp: Tensor, threshold: Tensor, total: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(p, gradient of w, gradient of p, keys that were dropped) of a tile."""
        p = _exponentials(x, logsumexp, threshold) / x.rows(total)
        x.env.p = p
        grad = x.part.group(x.part.rows(grad_out).to(x.values.dtype))
        dw = x.run.dropped(x.env, x.part.ungroup(grad @ x.values.transpose(-1, -2)).to(self.accumulate))
        dropped = x.run.without_slope(p, x.rows(threshold))
        return p, dw, through(derivative(x.run.call.spec.weight_expression, language.p), dw, x.env, dropped), dropped

    def _accumulate(
        self,
        x: _Scores,
        softmax: tuple[Tensor, Tensor, Tensor, Tensor],
        delta: Tensor,
        grad_out: Tensor,
        sums: list[Tensor | None],
    ) -> None:
        (p, dw, dp, dropped), spec = softmax, x.run.call.spec
        dq, dk, dv = (s if s is None or n == 0 else narrowed(s, 2, x.own) for n, s in enumerate(sums[:3]))
        into = [None if s is None else narrowed(s, self.cut.keys.get(n), x.own) for n, s in enumerate(sums[3:])]
        if dv is not None:
            w = x.part.group(x.run.weights(x.env, p).to(x.values.dtype))
            x.piece.of(dv).add_(w.transpose(-1, -2) @ x.part.group(x.part.rows(grad_out).to(x.values.dtype)))
        for load, slope, place in slopes(spec.weight_loads, spec.weight_expression, into):
            scatter(load, through(slope, dw, x.env), x.env, place)
        dt = p * (dp - x.rows(delta))
        for load, slope, place in slopes(spec.score_loads, spec.score_expression, into):
            scatter(load, through(slope, dt, x.env, dropped), x.env, place)
        ds = x.part.group(through(derivative(spec.score_expression, language.s), dt, x.env, dropped))
        if dq is not None:
            x.part.rows(dq).add_(x.part.ungroup(ds @ x.keys))
        if dk is not None:
            x.piece.of(dk).add_(ds.transpose(-1, -2) @ x.part.group(x.part.rows(self.call.q).to(self.accumulate)))

    @property
    def _value_dtype(self) -> torch.dtype:
        return torch.promote_types(self.accumulate, self.call.v.dtype)

    def _mine(self, x: Tensor) -> Tensor:
        """This rank's rows."""
        rows = self.call.q.shape[2] // self.ring.ranks
        return torch.cat([x.narrow(2, part.first, part.count) for part in self.ring.parts(rows)], 2)


def _exponentials(x: _Scores, shift: Tensor, threshold: Tensor) -> Tensor:
    """exp(t - shift) of the kept keys, 0 of the others."""
    finite = shift.masked_fill(shift == -torch.inf, 0.0)
    return select.kept_scores(x.t, x.rows(threshold)).sub_(x.rows(finite)).exp_()


def _ordered(t: Tensor) -> Tensor:
    """Scores -> int64 whose 32 or 64 bits, read as an unsigned number, have the same order; both zeros are the same."""
    if t.dtype == torch.float64:
        bits = (t + 0.0).view(torch.int64)
        return torch.where(bits >= 0, bits ^ torch.iinfo(torch.int64).min, ~bits)
    bits = (t + 0.0).view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(torch.int32).max).long() + 2**31


def _scores_of(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`."""
    if dtype == torch.float64:
        return torch.where(ordered < 0, ordered ^ torch.iinfo(torch.int64).min, ~ordered).view(torch.float64)
    bits = (ordered - 2**31).int()
    return torch.where(bits >= 0, bits, bits ^ torch.iinfo(torch.int32).max).view(torch.float32)
