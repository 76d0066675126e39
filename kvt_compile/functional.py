"""q, k, v -> attention over selected keys, for people who write models: `scaled_dot_product_attention` with one more
argument, `topk` or `select`.

softmax(scale * Q Kt + mask, over the keys that the selection keeps of each row) V
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.kernels.op import lowerings
from kvt_compile.select.geometry import needs_grid, needs_prefix, resolve_grid
from kvt_compile.select.text import parse
from kvt_compile.select.values import Selector, for_node
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
    text, best, by_grid, by_prefix = _read(str(select))  # of a text Dynamo makes a constant in every torch
    keys = k.shape[-2]
    # a node says no more than it needs, so that the same node is the same text
    placed = list(resolve_grid(grid, prefix, keys)) if by_grid else None
    where = (None, text, placed, prefix if by_prefix else 0)  # after the `draw` of a part of a larger call
    kept = 1.0 if best is None else best
    return _attention(q, k, v, kept, where, attn_mask, dropout_p, is_causal, scale, enable_gqa, lowering, 0.0)


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
) -> Tensor:
    """Checked arguments of the way in -> the operator.  `select`: its last arguments, none for the best of all keys."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() < (3 if enable_gqa else 2):
            raise ValueError(f"{name} has {x.dim()} dimensions, expected at least {3 if enable_gqa else 2}")
    if torch.is_autocast_enabled(q.device.type):
        # what autocast does to scaled_dot_product_attention
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in (q, k, v))
    if enable_gqa:
        batch, heads, kv_heads = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3]), q.shape[-3], k.shape[-3]
        lead = (*batch, heads)
    else:
        lead = _broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        batch, heads = lead[:-1], math.prod(lead[-1:])
        kv_heads = heads
    score = f"{_scale(scale, q)!r}*s"
    captured: list[Tensor] = []
    sizes: list[int] = []
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True were both given, expected at most one of them")
        mask, index = _mask(attn_mask, lead, q.shape[-2], k.shape[-2], sizes)
        captured.append(mask)
        score = f"where({index}, {score}, -oo)" if mask.dtype == torch.bool else f"{score} + {index}"
    elif is_causal:
        score = f"where(le(j, i), {score}, -oo)"
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability in [0, 1]")
    tolerance = constant(validate_tolerance(topk_tolerance))
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    tensors = _fold(q, batch, heads), _fold(k, batch, kv_heads), _fold(v, batch, kv_heads)
    inside = lowerings.inside()
    if lowering == "auto":
        lowering = inside.lowering
    keep = resolve(topk, k.shape[-2] * inside.ranks)
    rest = score, "p", keep, sizes, constant(dropout_p), seed, lowering, tolerance
    out = torch.ops.kvt.attention(*tensors, captured, *rest, *select)[0]
    return out if len(lead) == 2 else out.reshape(*lead, q.shape[-2], v.shape[-1])  # type: ignore[no-any-return]


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        # int: a symbolic D becomes its number, which the text needs
        return constant(1.0 / math.sqrt(max(int(q.shape[-1]), 1)))
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


def _mask(mask: Tensor, lead: Sequence[int], queries: int, keys: int, sizes: list[int]) -> tuple[Tensor, str]:
    """A mask -> the tensor to capture, without its dimensions of size 1, and its load: `c0[b, j]`.

    Leading dimensions that fold into b are read back out of it: of `[X, Y, H, Nq, Nk]`, y is `b % Y` and x is `b // Y`.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask is {mask.dtype}, expected bool (True = may attend) or floating point (added)")
    full = (*lead, queries, keys)
    if mask.dim() > len(full):
        raise ValueError(f"attn_mask has {mask.dim()} dimensions, expected at most {len(full)}")
    names = [*_batch_indices(lead[:-1], sizes), *(["h"] if lead else []), "i", "j"]
    skip = len(full) - mask.dim()
    kept, index = [], []
    for size, whole, name in zip(mask.shape, full[skip:], names[skip:], strict=True):
        if size == 1:
            continue
        if size != whole:
            raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {full}")
        kept.append(size)
        index.append(name)
    return mask.reshape(kept), f"c0[{', '.join(index)}]" if index else "c0"


def _batch_indices(batch: Sequence[int], sizes: list[int]) -> list[str]:
    """The index of every leading dimension as text over b; the sizes it needs are appended to `sizes`."""
    if len(batch) == 1:
        return ["b"]
    names = []
    for dim in range(len(batch)):
        sizes += [math.prod(batch[dim + 1 :]), batch[dim]]
        names.append(f"b // n{len(sizes) - 2} % n{len(sizes) - 1}")
    return names
