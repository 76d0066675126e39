"""The ranks of a process group, and what they send each other: whole sequences, sums, maxima.

Plain collectives that gloo and NCCL both have.  They run inside the operators, so graphs know nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kvt_compile.parallel.context.order import Order, Part, join, parts, split


@dataclass(frozen=True, eq=False)
class Ring:
    """A group and the order in which its ranks hold the sequence."""

    group: dist.ProcessGroup
    order: Order

    @property
    def ranks(self) -> int:
        return self.group.size()

    def parts(self, count: int) -> tuple[Part, ...]:
        """The runs of the sequence that this rank has, of `count` tokens."""
        return parts(self.order, self.group.rank(), self.ranks, count)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part -> the whole sequence, in its own order."""
        return join(self.each(x), dim, self.order)

    def each(self, x: Tensor) -> list[Tensor]:
        """What every rank has, all of one shape."""
        x = x.contiguous()
        shards = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(shards, x, group=self.group)
        return shards

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """Summands of the whole sequence -> this rank's part of their sum."""
        shards = [part.contiguous() for part in split(x, dim, self.order, self.ranks)]
        mine = torch.empty_like(shards[0])
        dist.reduce_scatter(mine, shards, group=self.group)
        return mine

    def sum(self, x: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(x, group=self.group)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """In place; no NaN."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x
