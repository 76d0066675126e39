"""Lowerings that are wrong on purpose: what a check has to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients

Where = Callable[[AttentionCall], bool]


class Wrong:
    """Another lowering, times `factor` in one of its results where `where` says so."""

    runner = backward_runner = None
    """Calls that were seen before are not to go past this."""

    def __init__(self, other: Any, part: str, factor: float, where: Where) -> None:
        self.other, self.part, self.factor, self.where = other, part, factor, where

    def __getattr__(self, name: str) -> Any:
        return getattr(self.other, name)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        if self.part == "raises" and self.where(call):
            raise RuntimeError("a lowering that fails")
        out, logsumexp, threshold = self.other.forward(call)
        return out * self._by("out", call), logsumexp, threshold

    def backward(self, call: AttentionCall, *saved: Tensor) -> Gradients:
        dq, dk, dv, captured = self.other.backward(call, *saved)
        by = self._by("captured", call)
        return dq, dk * self._by("k", call), dv, [x if x is None else x * by for x in captured]

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, *more: Any) -> Tensor:
        weights: Tensor = self.other.softmax(scores, dim, topk, dtype, *more)
        return weights * (self.factor if self.part == "weights" else 1.0)

    def _by(self, part: str, call: AttentionCall) -> float:
        return self.factor if part == self.part and self.where(call) else 1.0


@contextmanager
def wrong(part: str, *, factor: float = 1.001, where: Where = lambda call: True, name: str = "aten") -> Iterator[None]:
    """The lowering `name` with a wrong "out", "k" (its gradient), "captured" (their gradients) or "weights"; or it
    "raises"."""
    undo = lowerings.register(name, Wrong(lowerings.get(name), part, factor, where))  # type: ignore[arg-type]
    try:
        yield
    finally:
        undo()
