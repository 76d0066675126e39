"""q, k, v -> k-NN attention in ordinary torch operators, one tile of scores at a time: the lowering that always works.

Notation: B batch, Hq query heads, Hk key heads, Nq queries, Nk keys, D and Dv head dims.  A tile is [b, hq, i, Nk]:
whole rows, so that selection and softmax need nothing from outside it.  Memory is O(N * tile).

    forward    s = Q Kt   t = f(s)   tau = select(t)   p = softmax(t, t >= tau)   w = dropout(g(p))   out = w V
    backward   s, t, p, w again, then  dV += wt dO   dw = dropout(dO Vt)   dp = dw dg/dp   dt = p (dp - sum p dp)
               ds = dt df/ds   dQ = ds K   dK += dst Q   dc += dt df/dc + dw dg/dc

t is -inf where a selection does not allow a key.

Why the backward keeps the forward's keys: `Algorithm.scores` computes both, from the same tile plan and so with the
same matrix shapes, which gives the same bits; and the saved threshold lies midway between the smallest kept and the
largest dropped score, so that even other bits (another thread count, another lowering's forward) fall on the same side
unless they differ by half that gap.

Products run in float32 (float64 for float64), widened before, never rounded after.  Whoever allows TF32 for float32
products (`torch.set_float32_matmul_precision`) allows it here too, and with it other keys at near-ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels import dropout
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative, is_multiple
from kvt_compile.kernels.language.evaluate import compile_expression, compile_text, scatter, tile
from kvt_compile.kernels.language.grid import Environment, Grid
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.captured import check_call
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.plain import select, tiling
from kvt_compile.select.values import Mass, TopK

Slopes = list[tuple[language.load, sympy.Expr, Tensor]]


class Algorithm:
    """The parts of one call that forward and backward share."""

    def __init__(self, call: AttentionCall) -> None:
        check_call(call)
        self.call = call
        self.accumulate = call.spec.accumulate
        self.selection = call.selection
        rank = None if call.selection is None else call.selection.rank
        self.mass = rank.p if isinstance(rank, Mass) else 1.0
        self.lowest = isinstance(rank, TopK) and rank.ties == "lowest"
        self.chosen = {} if call.selection is None else call.selection.tables(call.q, call.k)
        # what the second product accumulates in
        self.value_dtype = torch.promote_types(call.spec.accumulate, call.v.dtype)

    def pieces(self) -> Iterable[tuple[tiling.Heads, Tensor, Tensor]]:
        """Each piece of the plan with its keys and values, widened once for all its tiles."""
        batch, heads, queries = self.call.rows
        kv_heads, keys = self.call.k.shape[1:3]
        if not keys:
            return
        for heads_part in tiling.plan(batch, heads, kv_heads, queries, keys, self.call.q.device.type):
            widened = heads_part.of(self.call.k).to(self.accumulate), heads_part.of(self.call.v).to(self.value_dtype)
            yield heads_part, *widened

    def scores(self, part: tiling.Tile, keys: Tensor) -> tuple[Environment, Tensor]:
        """Final scores t `[b, hq, i, Nk]` of a tile and the environment they were computed in."""
        q = part.group(part.rows(self.call.q).to(self.accumulate))
        grid = Grid(part.b, part.hq, part.i, range(keys.shape[-2]), q.device, q.dtype)
        s = part.ungroup(q @ keys.transpose(-1, -2))
        env = Environment(grid, self.call.captured, self.call.sizes, s=s)
        t = tile(compile_text(self.call.spec.score), env)
        if self.selection is not None:
            allowed = self.selection.map(self.call.rows[1], [grid.coordinate(x) for x in "bhij"], self.chosen)
            t = t if allowed is None else torch.where(allowed, t, -torch.inf)
        return env, t

    def weights_again(self, t: Tensor, logsumexp: Tensor, threshold: Tensor) -> Tensor:
        """Backward: the weights of a tile from its scores and what the forward saved of its rows."""
        if self.lowest:
            t = select.without_late_ties(t, threshold, self.call.topk)
        return select.weights_again(t, logsumexp, threshold)

    def without_slope(self, p: Tensor, threshold: Tensor) -> Tensor:
        """Keys of a tile that get no gradient though a slope may be infinite there: those that the selection dropped.
        Where it drops none, an infinite slope of a key without weight is NaN, as it is in the model."""
        return (p == 0.0) if self.selection is not None else (p == 0.0) & (threshold > -torch.inf)

    def weights(self, env: Environment, p: Tensor) -> Tensor:
        """What multiplies V: the weight expression of p, then dropout."""
        env.p = p
        return self.dropped(env, tile(compile_text(self.call.spec.weight), env))

    def dropped(self, env: Environment, x: Tensor) -> Tensor:
        """Dropout of one tile.  It is its own adjoint: a product with numbers that can be drawn again."""
        probability, seed = self.call.dropout_p, self.call.seed
        if seed is None or probability == 0.0:
            return x
        first, per_b, per_h, per_i = self.call.draw
        b, h, i, j = (env.grid.coordinate(axis) for axis in "bhij")
        offset = first + b * per_b + h * per_h + i * per_i + j
        return torch.where(dropout.dropped(offset, seed, probability), 0.0, x * dropout.keep_scale(probability))


class AtenLowering:
    """Any device, every spec."""

    name = "aten"
    devices: tuple[str, ...] = ()

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        run, device = Algorithm(call), call.q.device
        # what a row without keys has; every other row is overwritten
        out = torch.zeros((*call.rows, call.spec.value_dim), dtype=call.v.dtype, device=device)
        logsumexp, threshold = (
            torch.full((*call.rows, 1), -torch.inf, dtype=run.accumulate, device=device) for _ in range(2)
        )
        for piece, keys, values in run.pieces():
            for part in piece.tiles():
                env, t = run.scores(part, keys)
                p, row_logsumexp, row_threshold = select.softmax(t, call.topk, run.mass, run.lowest)
                w = part.group(run.weights(env, p).to(values.dtype))
                part.rows(out).copy_(part.ungroup(w @ values))
                part.rows(logsumexp).copy_(row_logsumexp)
                part.rows(threshold).copy_(row_threshold)
        return out, logsumexp.squeeze(-1), threshold.squeeze(-1)

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        run, spec = Algorithm(call), call.spec
        inputs = (call.q, call.k, call.v, *call.captured)
        # sums over tiles are wide: a bfloat16 sum would soon stop growing
        sums = [
            torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, spec.accumulate), device=x.device) if need else None
            for x, need in zip(inputs, spec.needs_grad, strict=True)
        ]
        dq, dk, dv, *dcaptured = sums
        score_slopes = slopes(spec.score_loads, spec.score_expression, dcaptured)
        weight_slopes = slopes(spec.weight_loads, spec.weight_expression, dcaptured)
        by_s = derivative(spec.score_expression, language.s)
        by_p = derivative(spec.weight_expression, language.p)
        only_values = dq is None and dk is None and not score_slopes and not weight_slopes
        for piece, keys, values in run.pieces():
            for part in piece.tiles():
                env, t = run.scores(part, keys)
                row_logsumexp, row_threshold = (part.rows(x).unsqueeze(-1) for x in (logsumexp, threshold))
                p = run.weights_again(t, row_logsumexp, row_threshold)
                grad = part.group(part.rows(grad_out).to(values.dtype))
                w = run.weights(env, p)
                if dv is not None:
                    piece.of(dv).add_(part.group(w.to(values.dtype)).transpose(-1, -2) @ grad)
                if only_values:
                    continue
                dw = run.dropped(env, part.ungroup(grad @ values.transpose(-1, -2)).to(spec.accumulate))
                dropped = run.without_slope(p, row_threshold)
                for load, slope, into in weight_slopes:
                    scatter(load, through(slope, dw, env), env, into)
                dp = through(by_p, dw, env, dropped)
                dt = p * (dp - (p * dp).sum(-1, keepdim=True))
                for load, slope, into in score_slopes:
                    scatter(load, through(slope, dt, env, dropped), env, into)
                ds = part.group(through(by_s, dt, env, dropped))
                if dq is not None:
                    part.rows(dq).copy_(part.ungroup(ds @ keys))
                if dk is not None:
                    piece.of(dk).add_(ds.transpose(-1, -2) @ part.group(part.rows(call.q).to(spec.accumulate)))
        dq, dk, dv, *dcaptured = (
            None if x is None else x.to(tensor.dtype) for x, tensor in zip(sums, inputs, strict=True)
        )
        return dq, dk, dv, dcaptured

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        out = torch.empty(_last(scores, dim).shape, dtype=dtype, device=scores.device)
        accumulate = torch.promote_types(scores.dtype, torch.float32)
        rows, out_rows = _flat(_last(scores, dim)), _flat(out)
        for block in _row_blocks(rows):
            out_rows[block] = select.softmax(rows[block].to(accumulate), topk)[0].to(dtype)
        return _back(out, dim, scores.shape)

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        out = torch.empty(_last(weights, dim).shape, dtype=input_dtype, device=weights.device)
        accumulate = torch.promote_types(weights.dtype, torch.float32)
        grads, rows, out_rows = _flat(_last(grad, dim)), _flat(_last(weights, dim)), _flat(out)
        for block in _row_blocks(rows):
            w, g = rows[block].to(accumulate), grads[block].to(accumulate)
            out_rows[block] = (w * (g - (w * g).sum(-1, keepdim=True))).to(input_dtype)
        return _back(out, dim, weights.shape)

    def source(self, spec: KernelSpec | SoftmaxSpec) -> None:
        return None


LOWERING = AtenLowering()


def slopes(loads: Sequence[language.load], expression: sympy.Expr, sums: Sequence[Tensor | None]) -> Slopes:
    """(load, derivative by it, where its gradient goes) for every load whose tensor needs one."""
    wanted = ((load, sums[load.slot]) for load in loads)
    return [(load, derivative(expression, load), into) for load, into in wanted if into is not None]


def through(slope: sympy.Expr, gradient: Tensor, env: Environment, dropped: Tensor | None = None) -> Tensor:
    """The derivative of a gradient; 0 where keys were dropped, whose slope may be infinite or NaN."""
    env.gradient = gradient
    x = tile(compile_expression(slope), env)
    return x if dropped is None or is_multiple(slope) else torch.where(dropped, 0.0, x)


def _last(x: Tensor, dim: int) -> Tensor:
    """`dim` as the last dimension; a 0-d tensor is a row of one."""
    return x.movedim(dim, -1) if x.dim() else x.reshape(1)


def _back(rows: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """The last dimension where `dim` was.  No view: a model may write to what an operator gave it."""
    if rows.shape == shape and dim == rows.dim() - 1:
        return rows
    out = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    return out.copy_(rows.movedim(-1, dim).reshape(shape))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])


def _row_blocks(rows: Tensor) -> Iterable[slice]:
    step = max(1, tiling.budget_of(rows.device.type) // max(rows.shape[-1], 1))
    return (slice(x.start, x.stop) for x in tiling.chunks(rows.shape[0], step))
