"""Bytes that a rank receives from others, counted at the collectives themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Count:
    """`received`: an all-gather receives the parts of the others, a reduce-scatter their summands of its part, and an
    all-reduce is a reduce-scatter and an all-gather."""

    def __init__(self) -> None:
        self.received = 0.0
        self.calls: list[str] = []

    def add(self, name: str, size: float) -> None:
        self.received += size
        self.calls.append(name)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def counted() -> Iterator[Count]:
    """Counts what goes through torch.distributed's functions, and the functional collectives of DTensor."""
    count = Count()
    plain = {name: getattr(dist, name) for name in ("all_gather", "reduce_scatter", "all_reduce")}

    def all_gather(shards: list[Tensor], x: Tensor, group: Any = None) -> Any:
        count.add("all_gather", (len(shards) - 1) * _bytes(x))
        return plain["all_gather"](shards, x, group=group)

    def reduce_scatter(mine: Tensor, shards: list[Tensor], group: Any = None) -> Any:
        count.add("reduce_scatter", (len(shards) - 1) * _bytes(mine))
        return plain["reduce_scatter"](mine, shards, group=group)

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        ranks = dist.get_world_size(group)
        count.add("all_reduce", 2 * (ranks - 1) / ranks * _bytes(x))
        return plain["all_reduce"](x, op, group=group)

    class Functional(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(x, dist.tensor.DTensor) for x in types):
                return NotImplemented
            out = func(*args, **(kwargs or {}))
            name = func.name()
            if "_c10d_functional::" in name and "wait" not in name and "_wrap_tensor" not in name:
                into, ranks = _bytes(out), dist.get_world_size()
                if "all_gather" in name:
                    count.add("all_gather", into * (ranks - 1) / ranks)
                elif "reduce_scatter" in name:
                    count.add("reduce_scatter", into * (ranks - 1))
                elif "all_reduce" in name:
                    count.add("all_reduce", 2 * into * (ranks - 1) / ranks)
                elif "all_to_all" in name:
                    count.add("all_to_all", into * (ranks - 1) / ranks)
                else:
                    raise AssertionError(f"not counted: {name}")
            return out

    try:
        for name, function in (
            ("all_gather", all_gather),
            ("reduce_scatter", reduce_scatter),
            ("all_reduce", all_reduce),
        ):
            setattr(dist, name, function)
        with Functional():
            yield count
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def received(layout: str, ranks: int, sizes: dict[str, int], *, backward: bool, wide: int = 4) -> float:
    """The formulas of docs/many_machines.md: bytes a rank receives in one attention.

    sizes: B, Hq, Hk, N, D, Dv and `e`, the bytes of a number; `wide`: of one that is summed.
    """
    B, Hq, Hk, N, D, Dv, e = (sizes[x] for x in ("B", "Hq", "Hk", "N", "D", "Dv", "e"))  # noqa: N806 - as in the docs
    others = (ranks - 1) / ranks
    keys, queries, results, rows = B * Hk * N * (D + Dv), B * Hq * N * D, B * Hq * N * Dv, B * Hq * N
    if layout in ("batch", "heads"):
        return 0.0
    if layout == "rows":  # of DTensors whose keys are whole; gradients of keys stay summands
        return 0.0
    if layout == "sequence":  # of DTensors, and the sums of dk and dv back to where k and v lie
        return others * keys * e * (1 if not backward else 2)
    if layout == "turned":  # of DTensors cut along the sequence, to the batch or heads
        assert not backward
        return others / ranks * (queries + keys) * e
    if layout == "gather":
        return others * (keys * e if not backward else keys * e + keys * wide)
    assert layout == "count"
    if not backward:
        counts = 2 * rows * (8 * wide // 4 * 16 * 4 + 3 * wide)  # all-reduced: there and back
        return others * (queries * e + results * wide + counts)
    return others * (queries * e + results * e + 2 * rows * wide + 2 * 2 * rows * wide + queries * wide)
