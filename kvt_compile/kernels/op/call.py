"""The arguments of one call of `kvt::attention` or of its backward, checked -> as every lowering takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvt_compile.kernels.dropout import place_of_draws
from kvt_compile.kernels.op.arguments import AttentionArguments
from kvt_compile.kernels.op.selection import Selection, selection_of
from kvt_compile.kernels.op.spec import KernelSpec


@dataclass(frozen=True, eq=False, slots=True)
class AttentionCall:
    """Checked: shapes fit each other, 1 <= topk <= max(Nk, 1).  Strides may be anything, 0 included."""

    spec: KernelSpec
    q: Tensor
    """`[B, Hq, Nq, D]`"""
    k: Tensor
    """`[B, Hk, Nk, D]`"""
    v: Tensor
    """`[B, Hk, Nk, Dv]`"""
    captured: Sequence[Tensor]
    """c0, c1, ... of the spec's expressions."""
    topk: int
    sizes: Sequence[int] = ()
    """n0, n1, ... of the spec's expressions."""
    dropout_p: float = 0.0
    seed: Tensor | None = None
    """One int64; given where dropout_p > 0."""
    tolerance: float = 0.0
    """Allows, and does not ask for, another number of keys in every row: any in `topk.kept_range(topk, tolerance)`.  A
    lowering that selects exactly may ignore it.  A backward needs none: the thresholds say what was kept."""
    asked: int = 0
    """`topk` as it was asked for: more than the keys of this call, where those are not all."""
    part: Sequence[int] | None = None
    """What the operators call `draw`; None where the call is no part of a larger one."""
    selection: Selection | None = None
    """Which keys may be kept, and by what they are ranked; None: all, by their scores."""

    @classmethod
    def of(cls, a: AttentionArguments, *, topk: int, needs_grad: Sequence[bool] = ()) -> AttentionCall:
        """`topk`: how many keys are kept, at most as many as there are.  Raises SpecError."""
        # the dispatcher carries out a lazy minus of q, k and v, but not of the tensors of an optional list
        captured, sizes = [x.resolve_neg() for x in a.captured or ()], a.sizes or ()
        shapes = a.q, a.k, a.v, captured
        spec = KernelSpec.of(*shapes, a.score, a.weight, len(sizes), a.dropout_p, needs_grad, a.select)
        selection = selection_of(a.select, a.grid, a.prefix, a.q.shape[2], a.k.shape[2])
        return cls(spec, *shapes, topk, sizes, a.dropout_p, a.seed, a.tolerance, a.topk, a.draw, selection)

    @property
    def rows(self) -> torch.Size:
        """`[B, Hq, Nq]`"""
        return self.q.shape[:3]

    @property
    def keys(self) -> int:
        """Nk"""
        return self.k.shape[2]

    @property
    def draw(self) -> tuple[int, int, int, int]:
        """(first, per_b, per_h, per_i): dropout of (b, h, i, j) is draw first + b*per_b + h*per_h + i*per_i + j."""
        return place_of_draws(self.rows, self.keys, self.part)
