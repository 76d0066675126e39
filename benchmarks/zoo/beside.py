"""Every rewritten site computed twice, by the lowering in use and by the reference, on the same inputs.

With both on the same inputs, what rounding did further up cannot move a key across the threshold here: whatever differs
is this site's doing.  (Whole models do differ: two tokens that mean the same tie but for rounding.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.compare import Check, apart, size
from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec

NAME = "beside the reference"
ROUNDINGS = 64
"""Roundings a sum over the keys of one row may have."""


class Beside:
    """A lowering that runs another and the reference, keeps the worst difference and returns the other's results."""

    name = NAME
    devices: tuple[str, ...] = ()

    def __init__(self, other: str = "auto") -> None:
        self.other = other
        self.calls = 0
        self.worst: Check = {"error": 0.0, "budget": 1.0}

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        results = lowerings.choose(self.other, call.spec, call.q.device.type).forward(call)
        self._note(results[0], lowerings.get("reference").forward(call)[0])
        return results

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, *more: Any) -> Tensor:
        spec = SoftmaxSpec.of(scores.dtype, dtype)
        weights = lowerings.choose(self.other, spec, scores.device.type).softmax(scores, dim, topk, dtype, *more)
        self._note(weights, lowerings.get("reference").softmax(scores, dim, topk, dtype, *more))
        return weights

    def _note(self, actual: Tensor, expected: Tensor) -> None:
        self.calls += 1
        scale = size(expected) or 1.0
        check = {"error": apart(actual, expected) / scale, "budget": ROUNDINGS * torch.finfo(actual.dtype).eps}
        if not check["error"] / check["budget"] <= self.worst["error"] / self.worst["budget"]:
            self.worst = check


@contextmanager
def beside_the_reference() -> Iterator[Beside]:
    """The lowering under its name, for as long as the block lasts."""
    lowering = Beside()
    undo = lowerings.register(NAME, lowering)  # type: ignore[arg-type]
    try:
        yield lowering
    finally:
        undo()
