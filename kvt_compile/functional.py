"""q, k, v -> attention over selected keys, for people who write models: `scaled_dot_product_attention` with one more
argument, `topk` or `select`.

softmax(scale * Q Kt + mask, over the keys that the selection keeps of each row) V
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.kernels.op import lowerings, ready
from kvt_compile.select.function import GIVEN, Condition, conditioned, givens
from kvt_compile.select.geometry import Geometry, needs_grid, needs_prefix, resolve_grid
from kvt_compile.select.text import parse
from kvt_compile.select.values import SelectionError, Selector, for_node
from kvt_compile.topk import TopK, constant, resolve, validate_tolerance


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: TopK,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lowering: str = "auto",
    topk_tolerance: float = 0.0,
) -> Tensor:
    """k-NN attention (KVT, arXiv 2106.00515): every query attends to its `topk` highest-scoring keys.

    Arguments and meaning are those of `torch.nn.functional.scaled_dot_product_attention`, except that keys below the
    topk-th largest score of their row are left out.  Keys tied there are all kept, scores are accumulated in float32
    (float64 for float64), and a row without a valid key gives zeros.

    Args:
        q: `[..., Hq, Nq, D]`, floating point, rank 2 or more; leading dimensions broadcast with those of k and v.
        k: `[..., Hk, Nk, D]`, in q's dtype.
        v: `[..., Hk, Nk, Dv]`, floating point.
        topk: how many keys to keep: an int >= 1 (more than Nk means Nk), or a float in (0, 1]: ceil(topk * Nk).
        attn_mask: broadcastable to `[..., Hq, Nq, Nk]`; bool (True = may attend) or floating point (added).
        dropout_p: probability that a kept weight becomes zero; drawn from torch's generator of q's device.
        is_causal: query i sees keys 0..i (aligned at the top left, as SDPA's); not together with attn_mask.
        scale: what the product is multiplied by; default 1 / sqrt(D).
        enable_gqa: Hq may be a multiple of Hk; query head h then uses key head h // (Hq // Hk).
        lowering: "auto", or another of `kvt_compile.kernels.lowerings.names()`.
        topk_tolerance: a row may keep any number of keys from ceil(k * (1 - t)) to floor(k * (1 + t)), 0 <= t < 1,
            which can be found faster than exactly k (ties add to it as ever).

    Returns `[..., Hq, Nq, Dv]` in v's dtype, differentiable once in q, k, v and a floating-point attn_mask.
    Raises TypeError or ValueError that names the argument, what was found and what was expected.
    """
    return _attention(
        q, k, v, topk, (), attn_mask, dropout_p, is_causal, scale,
        enable_gqa, lowering, topk_tolerance,
    )  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    select: Selector | str,
    grid: Sequence[int] | int | None = None,
    prefix: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lowering: str = "auto",
) -> Tensor:
    """Attention in which every query attends to the keys that a selection keeps.

    Arguments, shapes, dtypes and meaning are those of `topk_attention`, whose `topk=64` is `select="topk(64)"` here.

    Args:
        select: a value of `kvt_compile.select` (`window(13) & topk(64)`) or its text.  docs/selection.md defines each.
        grid: how the tokens after the prefix are laid out, in 1 to 3 axes, the last the fastest: (64, 64) for an image
            of 64 rows.  One size may be -1: whatever is left.  None: one axis.
        prefix: how many tokens stand before the grid (class and register tokens).

    What the selection does not allow is as if masked; a mask and is_causal hold besides.
    Raises SelectionError (a ValueError) for a selection that cannot be meant, and as `topk_attention`.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() < 2:
            raise ValueError(f"{name} has {x.dim()} dimensions, expected at least 2")
    if not isinstance(select, str | Selector):
        raise TypeError(
            f"select is {select!r} ({type(select).__name__}), expected a selection or its text: 'window(13)'"
        )
    condition: tuple[Condition, list[Tensor]] | None = None
    said = str(select)  # of a text Dynamo makes a constant in every torch
    if isinstance(select, Selector) and GIVEN in said:
        if not q.dim() == k.dim() == 4:
            raise SelectionError(
                f"{select} takes q and k of 4 dimensions, [B, H, N, D]; they have {q.dim()} and {k.dim()}"
            )
        found = [x.function(q, k) for x in givens(select)]
        condition = conditioned(select, found, q, k, Geometry(resolve_grid(grid, prefix, k.shape[2]), prefix))
        said = "topk(1.0)" if condition[0].left is None else str(condition[0].left)
    text, best, by_grid, by_prefix = _read(said)
    keys = k.shape[-2]
    # a node says no more than it needs, so that the same node is the same text
    placed = list(resolve_grid(grid, prefix, keys)) if by_grid else None
    where = (None, text, placed, prefix if by_prefix else 0)  # after the `draw` of a part of a larger call
    kept = 1.0 if best is None else best
    return _attention(
        q, k, v, kept, where, attn_mask, dropout_p, is_causal, scale, enable_gqa, lowering, 0.0, condition
    )


def _read(select: str) -> tuple[str, int | float | None, bool, bool]:
    """A selection's text -> the operator's text and k, and whether it asks for the grid and for the prefix.

    Dynamo need not trace the parser."""
    chosen = parse(select)
    return (*for_node(chosen), needs_grid(chosen), needs_prefix(chosen))


_read._dynamo_marked_constant = True  # type: ignore[attr-defined]
"""What `torch.compiler.assume_constant_result` does, which imports all of torch._dynamo first: seconds."""


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: TopK,
    select: tuple[object, ...],
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    lowering: str,
    topk_tolerance: float,
    condition: tuple[Condition, list[Tensor]] | None = None,
) -> Tensor:
    """Checked arguments of the way in -> the operator.  `select`: its last arguments, none for the best of all keys;
    `condition`: what must hold for a key besides, over tensors that are captured."""
    if torch.is_autocast_enabled(q.device.type):
        # what autocast does to scaled_dot_product_attention
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in (q, k, v))
    mask = None if attn_mask is None else (attn_mask.shape, attn_mask.dtype)
    asked = (
        q.shape, k.shape, v.shape, topk, mask, dropout_p, is_causal, scale,
        enable_gqa, lowering, topk_tolerance, lowerings.inside(),
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    plan = _plan(*asked) if compiling else _remembered(asked)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    captured = [] if attn_mask is None else [attn_mask.reshape(plan.mask)]
    if plan.folded is not None:
        batch, heads, kv_heads = plan.folded
        q, k, v = _fold(q, batch, heads), _fold(k, batch, kv_heads), _fold(v, batch, kv_heads)
    before = plan.before
    if condition is not None:
        before = (condition[0].around(str(before[0]), len(captured)), *before[1:])
        captured += condition[1]
    rest = (*before, seed, *plan.after, *select)
    found = None if compiling else ready.at_once(lowerings.check_inside, q, k, v, captured, rest)
    out = (torch.ops.kvt.attention(q, k, v, captured, *rest) if found is None else found)[0]
    return out if plan.result is None else out.reshape(plan.result)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What shapes and numbers of a call decide."""

    folded: tuple[Sequence[int], int, int] | None
    """Leading dimensions, heads of q, heads of k and v; None where q, k and v are what the operator takes."""
    mask: Sequence[int]
    """The shape of the mask without its dimensions of size 1."""
    before: tuple[object, ...]
    """The operator's arguments before its seed."""
    after: tuple[object, ...]
    result: tuple[int, ...] | None
    """None where it is the operator's."""


_MOST = 1024
_plans: dict[object, _Plan] = {}


def _remembered(asked: tuple[Any, ...]) -> _Plan:
    """`_plan`, once for all calls that ask the same: what it does in Python takes longer than a small attention."""
    key = (asked, *map(type, asked[3:]))  # 1 and 1.0 are equal, and another k
    try:
        plan = _plans.get(key)
    except TypeError:  # a symbolic size has no hash
        return _plan(*asked)
    if plan is None:
        plan = _plan(*asked)
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = plan
    return plan


def _plan(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    topk: TopK,
    mask: tuple[Sequence[int], torch.dtype] | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    lowering: str,
    topk_tolerance: float,
    inside: lowerings.Inside,
) -> _Plan:
    """Shapes of q, k and v and the rest of what was asked -> the plan.  Raises as `topk_attention`."""
    least = 3 if enable_gqa else 2
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < least:
            raise ValueError(f"{name} has {len(shape)} dimensions, expected at least {least}")
    if enable_gqa:
        batch, heads, kv_heads = _broadcast(q[:-3], k[:-3], v[:-3]), q[-3], k[-3]
        lead = (*batch, heads)
    else:
        lead = _broadcast(q[:-2], k[:-2], v[:-2])
        batch, heads = lead[:-1], math.prod(lead[-1:])
        kv_heads = heads
    score = f"{_scale(scale, q[-1])!r}*s"
    sizes: list[int] = []
    kept: list[int] = []
    if mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True were both given, expected at most one of them")
        kept, index = _mask(*mask, lead, q[-2], k[-2], sizes)
        score = f"where({index}, {score}, -oo)" if mask[1] == torch.bool else f"{score} + {index}"
    elif is_causal:
        score = f"where(le(j, i), {score}, -oo)"
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability in [0, 1]")
    tolerance = constant(validate_tolerance(topk_tolerance))
    keep = resolve(topk, k[-2] * inside.ranks)
    plain = len(batch) == 1 and tuple(q[:-2]) == lead and tuple(k[:-2]) == tuple(v[:-2]) == (*batch, kv_heads)
    return _Plan(
        None if plain else (batch, heads, kv_heads),
        kept,
        (score, "p", keep, sizes, constant(dropout_p)),
        (inside.lowering if lowering == "auto" else lowering, tolerance),
        None if len(lead) == 2 else (*lead, q[-2], v[-1]),
    )


def _scale(scale: float | None, features: int) -> float:
    if scale is None:
        # int: a symbolic D becomes its number, which the text needs
        return constant(1.0 / math.sqrt(max(int(features), 1)))
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected a finite number")
    return constant(scale)


def _broadcast(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> tuple[int, ...]:
    """Leading dimensions, broadcast."""
    rank = max(len(q), len(k), len(v))
    q_lead, k_lead, v_lead = ((1,) * (rank - len(x)) + tuple(x) for x in (q, k, v))
    lead = []
    for dims in zip(q_lead, k_lead, v_lead, strict=True):
        size = 1
        for dim in dims:
            if dim != 1 and size != 1 and dim != size:
                raise ValueError(
                    f"leading dimensions of q {tuple(q)}, k {tuple(k)} and v {tuple(v)} do not broadcast; "
                    "for fewer key heads than query heads pass enable_gqa=True"
                )
            size = size if dim == 1 else dim
        lead.append(size)
    return tuple(lead)


def _fold(x: Tensor, batch: Sequence[int], heads: int) -> Tensor:
    """`[..., H, N, D]` -> `[B, heads, N, D]`; a view wherever the strides allow."""
    if x.shape[:-2] == (*batch, heads) and len(batch) == 1:
        return x
    tokens, features = x.shape[-2:]
    return x.expand(*batch, heads, tokens, features).reshape(math.prod(batch), heads, tokens, features)


def _mask(
    shape: Sequence[int], dtype: torch.dtype, lead: Sequence[int], queries: int, keys: int, sizes: list[int]
) -> tuple[list[int], str]:
    """A mask's shape -> that of the tensor to capture, without dimensions of size 1, and its load: `c0[b, j]`.

    Leading dimensions that fold into b are read back out of it: of `[X, Y, H, Nq, Nk]`, y is `b % Y` and x is `b // Y`.
    """
    if dtype != torch.bool and not dtype.is_floating_point:
        raise TypeError(f"attn_mask is {dtype}, expected bool (True = may attend) or floating point (added)")
    full = (*lead, queries, keys)
    if len(shape) > len(full):
        raise ValueError(f"attn_mask has {len(shape)} dimensions, expected at most {len(full)}")
    names = [*_batch_indices(lead[:-1], sizes), *(["h"] if lead else []), "i", "j"]
    skip = len(full) - len(shape)
    kept, index = [], []
    for size, whole, name in zip(shape, full[skip:], names[skip:], strict=True):
        if size == 1:
            continue
        if size != whole:
            raise ValueError(f"attn_mask has shape {tuple(shape)}, which does not broadcast to {full}")
        kept.append(size)
        index.append(name)
    return kept, f"c0[{', '.join(index)}]" if index else "c0"


def _batch_indices(batch: Sequence[int], sizes: list[int]) -> list[str]:
    """The index of every leading dimension as text over b; the sizes it needs are appended to `sizes`."""
    if len(batch) == 1:
        return ["b"]
    names = []
    for dim in range(len(batch)):
        sizes += [math.prod(batch[dim + 1 :]), batch[dim]]
        names.append(f"b // n{len(sizes) - 2} % n{len(sizes) - 1}")
    return names
