"""What functions of `given` returned of a call's q and k -> a condition on coordinates that a node's score can hold,
and the tensors it reads.

    (given(f) | sinks(4)) & window(13)   ->   window(13),  "logical_or({0}[b, h, i, j], lt(j, 4))",  [f(q, k)]
    given(f, size=8), on one axis        ->   "{0}[b, h, i // 8, j // 8]",  [f(q, k)]

What a function returns is a tensor, and a selection is a text, so it is no part of the selection that an operator is
given: it becomes a captured tensor and a `where` of the score, which every lowering computes.  No gradient flows
through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
Dims = tuple[int, ...]
"""Of `[B, H, queries, keys]` (or regions), the dimensions that a tensor has."""


@dataclass(frozen=True)
class Condition:
    """What functions decide of a selection, and what they leave to the operator."""

    left: Selector | None
    """The selection that the operator is given; None: none."""
    text: str
    """What must hold for a key besides; `{n}` is the n-th tensor."""
    dims: tuple[Dims, ...]
    """Those of each tensor."""

    def around(self, score: str, captured: int) -> str:
        """The score under the condition, of a node that captures `captured` tensors before those of the condition."""
        names = (f"c{captured + n}" for n in range(len(self.dims)))
        return f"where({self.text.format(*names)}, {score}, -oo)"


def has_given(x: Selector) -> bool:
    """Whether a function decides a part of it."""
    return any(isinstance(y, Given) for y in leaves(x))


def givens(x: Selector) -> list[Given]:
    """What functions decide of it, in the order of `conditioned`."""
    return [y for y in leaves(x) if isinstance(y, Given)]


def conditioned(
    x: Selector,
    found: Sequence[Any],
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    dims: Sequence[Dims] | None = None,
) -> tuple[Condition, list[Tensor]]:
    """What the functions of `givens(x)` returned of q `[B, Hq, Nq, D]` and k `[B, Hk, Nk, D]` -> the condition, and the
    tensors it reads, all of them bool.

    dims: those that the tensors had before, in a graph that reads them so; what is returned now has to fit.
    Raises SelectionError for what a function may not return, and where it may not stand.
    """
    may, rank = split(x)
    assert may is not None
    check_geometry(may, geometry, q.shape[2], k.shape[2])
    parts = may.parts if isinstance(may, Both) else (may,)
    rest = [part for part in parts if not has_given(part)]
    call = _Call(q, k, geometry, list(found), None if dims is None else list(dims), [], [])
    conditions: list[str] = []
    for part in parts:
        if isinstance(part, Given):
            returned = call.next(part)
            if returned.dtype != torch.bool:
                returned, rank = _best(part, returned, rank, rest, call), None
            conditions.append(_load(part, returned, call))
        elif has_given(part):
            conditions.append(_condition(part, call))
    left = [*rest, *([] if rank is None else [rank])]
    whole = None if not left else left[0] if len(left) == 1 else Both(tuple(left))
    return Condition(whole, _joined("logical_and", conditions), tuple(call.dims)), call.tensors


@dataclass
class _Call:
    """q and k, what is still to be read of what functions returned, and what was made of the rest."""

    q: Tensor
    k: Tensor
    geometry: Geometry
    found: list[Any]
    before: list[Dims] | None
    tensors: list[Tensor]
    dims: list[Dims]

    def next(self, x: Given) -> Tensor:
        """What the next function returned, without its gradient."""
        found = self.found.pop(0)
        if not isinstance(found, Tensor) or not (found.dtype == torch.bool or found.is_floating_point()):
            shown = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise SelectionError(f"{x} returned {shown}, expected a bool map or floating-point scores")
        if found.device != self.q.device:
            raise SelectionError(f"{x} returned a tensor on {found.device}, expected one on {self.q.device}, as q is")
        return found.detach()

    def shape(self, x: Given) -> tuple[int, ...]:
        """What it returns has to broadcast to."""
        if x.size is None:
            return (*self.q.shape[:3], self.k.shape[2])
        regions = 1
        for size, of in zip(self.geometry.grid, per_axis(x.size, len(self.geometry.grid)), strict=True):
            regions *= -(-size // of)
        return (*self.q.shape[:2], regions, regions)

    def aligned(self, x: Given, found: Tensor) -> Tensor:
        """With four dimensions."""
        shape = self.shape(x)
        if found.dim() > 4 or any(
            a not in (1, b) for a, b in zip(reversed(found.shape), reversed(shape), strict=False)
        ):
            raise SelectionError(
                f"{x} returned a map of shape {tuple(found.shape)}, which does not broadcast to {tuple(shape)}"
            )
        return found.reshape((*(1,) * (4 - found.dim()), *found.shape))


def _best(x: Given, found: Tensor, rank: TopK | Mass | None, rest: list[Selector], call: _Call) -> Tensor:
    """Scores -> which are among the k best of their row, within what the rest allows."""
    if x.size is not None or not isinstance(rank, TopK):
        raise SelectionError(
            f"{x} returned {found.dtype}: scores are of single keys, and are ranked by topk; "
            "write given(...) & topk(k), or let it return bool"
        )
    q, k, shape = call.q, call.k, call.shape(x)
    scores = call.aligned(x, found).expand(shape)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    axes = [[-1 if n == m else 1 for m in range(4)] for n in range(4)]
    b, h, i, j = (torch.arange(n, device=q.device).view(axis) for n, axis in zip(shape, axes, strict=True))
    for other in rest:
        at = Places(call.geometry, q.shape[1], b, h, i, j, tables(other, call.geometry, q, k))
        scores = scores.masked_fill(~allowed(other, at), -torch.inf)
    count = resolve(rank.k, shape[3])
    order = scores.sort(dim=-1, descending=True, stable=True)
    valid = scores > -torch.inf
    if rank.ties == "lowest":
        return torch.zeros_like(valid).scatter_(-1, order.indices[..., :count], True) & valid
    return (scores >= order.values[..., count - 1 : count]) & valid


def _condition(x: Selector, call: _Call) -> str:
    if isinstance(x, Both | Either):
        return _joined("logical_and" if isinstance(x, Both) else "logical_or", [_condition(y, call) for y in x.parts])
    if isinstance(x, Sinks):
        return f"lt(j, {x.n})"
    if isinstance(x, Prefix):
        n = prefix_of(x, call.geometry)
        return f"logical_or(lt(j, {n}), lt(i, {n}))"
    if not isinstance(x, Given):
        raise SelectionError(
            f"{x} stands beside given(...) inside of `|`, where prefix and sinks can: "
            "let the function keep those keys too"
        )
    found = call.next(x)
    if found.dtype != torch.bool:
        raise SelectionError(f"{x} returned {found.dtype} inside of `|`, expected a bool map: scores are ranked alone")
    return _load(x, found, call)


def _load(x: Given, found: Tensor, call: _Call) -> str:
    geometry = call.geometry
    names, on_grid = ["b", "h", "i", "j"], ""
    if x.size is not None:
        names[2:] = [_region(x, geometry, token) for token in "ij"]
        on_grid = f"le({geometry.prefix}, i), le({geometry.prefix}, j)" if geometry.prefix else ""
    shape, left_out = call.shape(x), 4 - found.dim()
    found = call.aligned(x, found)
    if call.before is None:
        # a dimension of size 1 that is whole, too: another batch may be larger
        kept = tuple(n for n in range(left_out, 4) if found.shape[n] != 1 or shape[n] == 1)
    else:
        kept = call.before.pop(0)
        if any(found.shape[n] != 1 for n in range(4) if n not in kept):
            raise SelectionError(
                f"{x} returned a map of shape {tuple(found.shape)}, and one without dimension "
                f"{next(n for n in range(4) if n not in kept and found.shape[n] != 1)} when it was built in"
            )
        found = found.expand([shape[n] if n in kept else 1 for n in range(4)])
    call.dims.append(kept)
    call.tensors.append(found.reshape([found.shape[n] for n in kept]))
    index = f"[{', '.join(names[n] for n in kept)}]" if kept else ""
    load = f"{{{len(call.tensors) - 1}}}{index}"
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
