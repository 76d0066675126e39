"""`given(function)` and the tensors of a call -> a condition on coordinates that a node's score can hold.

    (given(f) | sinks(4)) & window(13)   ->   window(13),  "logical_or({0}[b, h, i, j], lt(j, 4))",  [f(q, k)]
    given(f, size=8), on one axis        ->   "{0}[b, h, i // 8, j // 8]",  [f(q, k)]

What a function returns is a tensor, and a selection is a text, so it is no part of the selection that an operator is
given: it becomes a captured tensor and a `where` of the score, which every lowering computes.  No gradient flows
through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvt_compile.select.content import tables
from kvt_compile.select.geometry import Geometry, check_geometry
from kvt_compile.select.maps import Places, allowed, prefix_of
from kvt_compile.select.values import (
    Both,
    Either,
    Given,
    Mass,
    Prefix,
    SelectionError,
    Selector,
    Sinks,
    TopK,
    leaves,
    per_axis,
    split,
)
from kvt_compile.topk import resolve

GIVEN = "given("
"""What the text of a selection holds that a function decides a part of, and no other text."""


def has_given(x: Selector) -> bool:
    """Whether a function decides a part of it."""
    return any(isinstance(y, Given) for y in leaves(x))


def outside(x: Selector, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Selector | None, str, list[Tensor]]:
    """q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]` -> what is left for the operator (None: nothing), the condition, in which
    `{n}` is the n-th tensor, and the tensors."""
    may, rank = split(x)
    assert may is not None
    parts = may.parts if isinstance(may, Both) else (may,)
    rest = [part for part in parts if not has_given(part)]
    conditions: list[str] = []
    tensors: list[Tensor] = []
    for part in parts:
        if has_given(part):
            found, rank = _scores(part, rank, rest, q, k, geometry)
            conditions.append(_condition(part, q, k, geometry, tensors, found))
    left = [*rest, *([] if rank is None else [rank])]
    whole = None if not left else left[0] if len(left) == 1 else Both(tuple(left))
    return whole, _joined("logical_and", conditions), tensors


def _scores(
    part: Selector, rank: TopK | Mass | None, rest: list[Selector], q: Tensor, k: Tensor, geometry: Geometry
) -> tuple[Tensor | None, TopK | Mass | None]:
    """(what a function returned alone, where that are scores their best as a map; what is left to rank)"""
    if not isinstance(part, Given):
        return None, rank
    found = _call(part, q, k)
    if found.dtype == torch.bool:
        return found, rank
    if part.size is not None or not isinstance(rank, TopK):
        raise SelectionError(
            f"{part} returned {found.dtype}: scores are of single keys, and are ranked by topk; "
            "write given(...) & topk(k), or let it return bool"
        )
    shape = (*q.shape[:3], k.shape[2])
    scores = found.expand(shape).float() if found.dtype != torch.float64 else found.expand(shape)
    axes = [[-1 if n == m else 1 for m in range(4)] for n in range(4)]
    b, h, i, j = (torch.arange(n, device=q.device).view(axis) for n, axis in zip(shape, axes, strict=True))
    for other in rest:
        check_geometry(other, geometry, q.shape[2], k.shape[2])
        at = Places(geometry, q.shape[1], b, h, i, j, tables(other, geometry, q, k))
        scores = scores.masked_fill(~allowed(other, at), -torch.inf)
    return _best(scores, resolve(rank.k, shape[3]), rank.ties == "lowest"), None


def _best(scores: Tensor, count: int, lowest: bool) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True)
    valid = scores > -torch.inf
    if lowest:
        return torch.zeros_like(valid).scatter_(-1, order.indices[..., :count], True) & valid
    return (scores >= order.values[..., count - 1 : count]) & valid


def _call(x: Given, q: Tensor, k: Tensor) -> Tensor:
    found = x.function(q, k)
    if not isinstance(found, Tensor) or not (found.dtype == torch.bool or found.is_floating_point()):
        shown = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise SelectionError(f"{x} returned {shown}, expected a bool map or floating-point scores")
    return found.detach()


def _condition(
    x: Selector, q: Tensor, k: Tensor, geometry: Geometry, tensors: list[Tensor], found: Tensor | None = None
) -> str:
    if isinstance(x, Both | Either):
        texts = [_condition(part, q, k, geometry, tensors) for part in x.parts]
        return _joined("logical_and" if isinstance(x, Both) else "logical_or", texts)
    if isinstance(x, Sinks):
        return f"lt(j, {x.n})"
    if isinstance(x, Prefix):
        n = prefix_of(x, geometry)
        return f"logical_or(lt(j, {n}), lt(i, {n}))"
    if not isinstance(x, Given):
        raise SelectionError(
            f"{x} stands beside given(...) inside of `|`, where prefix and sinks can: "
            "let the function keep those keys too"
        )
    found = _call(x, q, k) if found is None else found
    if found.dtype != torch.bool:
        raise SelectionError(f"{x} returned {found.dtype} inside of `|`, expected a bool map: scores are ranked alone")
    return _load(x, found, q, k, geometry, tensors)


def _load(x: Given, found: Tensor, q: Tensor, k: Tensor, geometry: Geometry, tensors: list[Tensor]) -> str:
    if x.size is None:
        shape, names, on_grid = (*q.shape[:3], k.shape[2]), ["b", "h", "i", "j"], ""
    else:
        check_geometry(x, geometry, q.shape[2], k.shape[2])
        regions, names = 1, ["b", "h"]
        for size, of in zip(geometry.grid, per_axis(x.size, len(geometry.grid)), strict=True):
            regions *= -(-size // of)
        shape = (*q.shape[:2], regions, regions)
        names += [_region(x, geometry, token) for token in "ij"]
        on_grid = f"le({geometry.prefix}, i), le({geometry.prefix}, j)" if geometry.prefix else ""
    if found.dim() > 4 or any(a not in (1, b) for a, b in zip(reversed(found.shape), reversed(shape), strict=False)):
        raise SelectionError(
            f"{x} returned a map of shape {tuple(found.shape)}, which does not broadcast to {tuple(shape)}"
        )
    kept = [(size, name) for size, name in zip(reversed(found.shape), reversed(names), strict=False) if size != 1]
    kept.reverse()
    index = f"[{', '.join(name for _, name in kept)}]" if kept else ""
    tensors.append(found.reshape([size for size, _ in kept]))
    load = f"{{{len(tensors) - 1}}}{index}"
    return f"logical_and(logical_and({on_grid}), {load})" if on_grid else load


def _region(x: Given, geometry: Geometry, token: str) -> str:
    """The number of a token's region, as an index."""
    assert x.size is not None
    place, text = (f"({token} - {geometry.prefix})" if geometry.prefix else token), ""
    step = 1
    for size in geometry.grid:
        step *= size
    for axis, (size, of) in enumerate(zip(geometry.grid, per_axis(x.size, len(geometry.grid)), strict=True)):
        step //= size
        along = place if step == 1 else f"{place} // {step}"
        if axis:
            along = f"({along}) % {size}" if step > 1 else f"{along} % {size}"
        along = along if of == 1 else f"({along}) // {of}"
        text = along if not text else f"({text}) * {-(-size // of)} + {along}"
    return text


def _joined(function: str, texts: list[str]) -> str:
    found = texts[0]
    for text in texts[1:]:
        found = f"{function}({found}, {text})"
    return found
