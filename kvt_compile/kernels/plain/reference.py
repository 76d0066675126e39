"""The contract as straightforward code: dense, one row of the definition after the other, differentiable by autograd.

    q, k, v, captured  ->  Reference(out, logsumexp, threshold, kept)

    s = Q Kt        t = f(s)        tau_i = topk-th largest of t_i        kept = (t >= tau) and (t > -inf)
    p = softmax of t over kept      w = dropout(g(p))                     out = w V

Every lowering is tested against this file and none imports it; it shares with them only the parser of the score
language and the random numbers.  Memory is O(Nq * Nk): for tests and small inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import sympy
import torch
from torch import Tensor

from kvt_compile.kernels import dropout
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.types import FLOAT, INT, Types, of_captured
from kvt_compile.kernels.op.selection import Selection
from kvt_compile.select.values import Mass, TopK
from kvt_compile.topk import kept_range


class Reference(NamedTuple):
    """out `[B, Hq, Nq, Dv]`; logsumexp and threshold `[B, Hq, Nq]`; kept `[B, Hq, Nq, Nk]` bool.

    `threshold` is tau itself, -inf where every valid key is kept.  A row that dense softmax makes NaN is NaN in all but
    `kept`, where it is True."""

    out: Tensor
    logsumexp: Tensor
    threshold: Tensor
    kept: Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor] = (),
    *,
    topk: int,
    score: str = "s",
    weight: str = "p",
    sizes: Sequence[int] = (),
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    draw: Sequence[int] | None = None,
    selection: Selection | None = None,
    dtype: torch.dtype = torch.float64,
) -> Reference:
    """k-NN attention computed in `dtype` throughout; `out` stays in `dtype`.

    q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`, v `[B, Hk, Nk, Dv]`, Hq a multiple of Hk; captured, score, weight, sizes,
    dropout_p, seed and draw as for `kvt::attention`; selection as `AttentionCall` has it: keys it does not allow are
    as if their scores were -inf.
    """
    heads, keys = q.shape[1], k.shape[2]
    v = v.to(dtype).repeat_interleave(heads // max(v.shape[1], 1), dim=1)
    names = _names(q, k, sizes)
    t = reference_scores(q, k, captured, score=score, sizes=sizes, dtype=dtype)
    if selection is None:
        p, logsumexp, threshold, kept = reference_softmax(t, topk)
    else:
        allowed = selection.map(heads, [names[x] for x in "bhij"], selection.tables(q.detach(), k.detach()))
        t = t if allowed is None else t.masked_fill(~allowed, -torch.inf)
        rank = selection.rank
        mass = rank.p if isinstance(rank, Mass) else 1.0
        lowest = isinstance(rank, TopK) and rank.ties == "lowest"
        p, logsumexp, threshold, kept = reference_softmax(t, topk, mass, lowest)
    w = _evaluate(language.parse(weight), names | {"p": p}, captured, dtype).to(dtype).expand(t.shape)
    if dropout_p > 0.0 and seed is not None:
        b, h, i, j = (names[x] for x in "bhij")
        first, per_b, per_h, per_i = dropout.place_of_draws(q.shape[:3], keys, draw)
        offset = first + b * per_b + h * per_h + i * per_i + j
        w = torch.where(dropout.dropped(offset, seed, dropout_p), 0.0, w * dropout.keep_scale(dropout_p))
    return Reference(w @ v, logsumexp, threshold, kept)


def reference_scores(
    q: Tensor,
    k: Tensor,
    captured: Sequence[Tensor] = (),
    *,
    score: str = "s",
    sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The final scores t `[B, Hq, Nq, Nk]` in `dtype`; arguments as for `reference_attention`."""
    s = _products(q.to(dtype), k.to(dtype).repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1))
    names = _names(q, k, sizes) | {"s": s}
    return _evaluate(language.parse(score), names, captured, dtype).to(dtype).expand(s.shape)


_CHUNK = 2**22
"""Numbers a chunk of products may have."""


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q kT.  In float64 every element is summed in the same order: keys with the same features tie, where a matrix
    product of BLAS may round the columns at its border another way.  In float32 it is what eager code computes."""
    if q.dtype != torch.float64:
        return q @ k.transpose(-1, -2)
    rows = max(1, _CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2] * k.shape[3]))
    chunks = [(part.unsqueeze(3) * k.unsqueeze(2)).sum(-1) for part in q.split(rows, dim=2)]
    return torch.cat(chunks, dim=2)


def within_tolerance(t: Tensor, kept: Tensor, topk: int, tolerance: float) -> Tensor:
    """Scores t and kept `[..., Nk]` -> `[...]` bool: whether a row keeps what it may under a tolerance.

    That is what it would keep, exactly and with all ties, for some k' in `kept_range(topk, tolerance)`.  A row that
    dense softmax makes NaN may say anything.
    """
    low, high = kept_range(topk, tolerance)
    valid = t > -torch.inf
    broken = (t.isnan() | (t == torch.inf)).any(-1)
    smallest = torch.where(kept, t, torch.inf).amin(-1, keepdim=True)
    closed = (kept == ((t >= smallest) & valid)).all(-1)
    enough = kept.sum(-1) >= valid.sum(-1).clamp(max=low)
    few = (t > smallest).sum(-1) < high  # the keys above the ties at the threshold: the ties may exceed
    return (closed & enough & few) | broken


def reference_softmax(
    t: Tensor, topk: int, mass: float = 1.0, lowest: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t `[..., Nk]` -> (weights, logsumexp, threshold, kept), as in `Reference`, along the last dimension.

    mass < 1: not topk but the fewest best keys with at least that softmax mass.  lowest: of tied keys the first ones.
    """
    if t.shape[-1] == 0:
        nothing = torch.full_like(t[..., :0].sum(-1), -torch.inf)
        return t, nothing, nothing, t > 0
    descending, order = t.detach().sort(dim=-1, descending=True, stable=True)
    if mass < 1.0:
        reached = descending.softmax(-1).cumsum(-1) >= mass
        first = torch.where(reached.any(-1), reached.int().argmax(-1), t.shape[-1] - 1)
        tau = descending.gather(-1, first.unsqueeze(-1))
    else:
        tau = descending[..., min(topk, t.shape[-1]) - 1].unsqueeze(-1)
    valid = t > -torch.inf
    broken = (t.isnan() | (t == torch.inf)).any(-1, keepdim=True)
    kept = ((t >= tau) & valid) | broken
    if lowest:
        first_ones = torch.zeros_like(kept).scatter(-1, order[..., : min(topk, t.shape[-1])], True)
        kept = (kept & first_ones) | broken
    # softmax of a row of -inf is NaN, forward and backward: such rows are computed on zeros and replaced
    empty = ~kept.any(-1, keepdim=True)
    masked = t.masked_fill(~kept, -torch.inf)
    weights = masked.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    threshold = tau.masked_fill((kept == valid).all(-1, keepdim=True), -torch.inf).masked_fill(broken, torch.nan)
    return weights, masked.logsumexp(-1).masked_fill(broken.squeeze(-1), torch.nan), threshold.squeeze(-1), kept


def _names(q: Tensor, k: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    coordinates = _coordinates((*q.shape[:3], k.shape[2]), q.device)
    return coordinates | {f"n{n}": torch.tensor(x) for n, x in enumerate(sizes)}


def _coordinates(shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    grid = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    return dict(zip("bhij", grid, strict=True))


def _evaluate(
    expression: sympy.Expr, names: dict[str, Tensor], captured: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """One torch operation per node of the expression, all on the full [B, Hq, Nq, Nk] grid."""
    types = Types(
        str(dtype).removeprefix("torch."), of_captured([str(x.dtype).removeprefix("torch.") for x in captured])
    )

    def value(x: sympy.Expr, places: Tensor | None = None) -> Tensor:
        """places: where a gradient comes to what is read; everywhere unless given."""
        if isinstance(x, sympy.Symbol):
            return _seen(names[str(x)], places)
        if isinstance(x, language.load):
            return _seen(brought(_element(x, captured, index), types(x)), places)
        if language.is_index(x):
            return index(x)
        if language.is_number(x):
            return torch.tensor(float(x), dtype=torch.float64)
        name = type(x).__name__
        if name in language.CASTS:
            return brought(value(x.args[0], places), types(x))
        if name in ("logical_and", "logical_or", "logical_not"):
            return _FUNCTIONS[name](*map(value, x.args))
        met = types.meets_in(x)
        if name == "where":
            condition = value(x.args[0]).bool()
            at = places, places
            if language.is_of_places(x.args[0]):
                at = (condition, ~condition) if places is None else (condition & places, ~condition & places)
            yes, no = (brought(value(y, here), met) for y, here in zip(x.args[1:], at, strict=True))
            return torch.where(condition, yes, no)
        if name == "power" and language.is_number(x.args[1]):
            exponent = x.args[1]
            return brought(value(x.args[0], places), met) ** (int(exponent) if exponent.is_Integer else float(exponent))
        return _FUNCTIONS[name](*(brought(value(y, places), met) for y in x.args))

    def index(x: sympy.Expr) -> Tensor:
        """What stands in brackets: whole numbers, whose sums and products are exact in any order."""
        if isinstance(x, sympy.Integer):
            return torch.tensor(int(x))
        if isinstance(x, sympy.Add | sympy.Mul | sympy.Pow | language.floordiv | language.mod):
            function = _OF_INDICES[next(kind for kind in _OF_INDICES if isinstance(x, kind))]
            return reduce(function, map(index, x.args))
        return value(x)

    def brought(x: Tensor, name: str) -> Tensor:
        if name in (FLOAT, INT):
            return x.to(dtype if name == FLOAT else torch.int64)
        return x.to(getattr(torch, name))

    return value(expression)


def _seen(x: Tensor, places: Tensor | None) -> Tensor:
    return torch.where(places, x, x.detach()) if places is not None and x.requires_grad else x


def _element(load: language.load, captured: Sequence[Tensor], index: Callable[[sympy.Expr], Tensor]) -> Tensor:
    tensor = captured[load.slot]
    if not load.index:
        return tensor
    inside = (index(x).clamp(0, size - 1) for x, size in zip(load.index, tensor.shape, strict=True))
    return tensor[tuple(inside)]


def _whole_division(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A whole number divided by 0 is 0: torch raises."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point() or y.is_floating_point():
            return function(x, y)
        return torch.where(y == 0, 0, function(x, y.where(y != 0, 1)))

    return run


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """With the whole gradient at its bounds; that of torch.clamp depends on torch's version."""
    bound = torch.where((x > high) | (high < low), high, torch.where(low < high, low, low.detach()))
    return torch.where((x >= low) & (x <= high), x, torch.where(x == x, bound, x.detach()))


_OF_INDICES: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    sympy.Add: torch.add,
    sympy.Mul: torch.mul,
    sympy.Pow: torch.pow,
    language.floordiv: _whole_division(torch.floor_divide),
    language.mod: _whole_division(torch.remainder),
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{name: getattr(torch, name) for name in ("logical_and", "logical_or", "logical_not")},
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "neg", "abs", "relu")},
    **{name: getattr(torch, name) for name in ("exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf")},
    "power": torch.pow,
    "floordiv": _whole_division(torch.floor_divide),
    "mod": _whole_division(torch.remainder),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": _clamp,
    "hardtanh": lambda x, low, high: torch.where((x > low) & (x < high), x, x.detach().clamp(low, high)),
}
