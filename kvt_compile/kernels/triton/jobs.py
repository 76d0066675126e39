"""A launch -> a description of it that another process can act on: compile its candidates, or measure them (`worker`).

Tensors are described by shape, strides and dtype.  Their contents stay here: the worker draws its own, so that what is
measured is the kernel's time on tensors like the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.tune.race import Effort


@dataclass(frozen=True)
class Described:
    """A tensor without its contents."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool
    """To 16 bytes, which Triton compiles for."""

    @classmethod
    def of(cls, x: Tensor) -> Described:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.data_ptr() % 16 == 0)

    def like(self, device: torch.device) -> Tensor:
        """Such a tensor: normal numbers, True, or 0, which is inside of whatever it indexes."""
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        numbers = torch.zeros(max(reach, 1), dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            numbers.normal_()
        elif self.dtype == torch.bool:
            numbers.fill_(True)
        return numbers.as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Sizes:
    """How many programs a launch takes: a tile of rows of a head each, in backward_kv a tile of keys of a key head."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int

    @classmethod
    def of(cls, call: AttentionCall) -> Sizes:
        batch, heads, queries = call.rows
        kv_heads, keys = call.k.shape[1:3]
        return cls(batch, heads, kv_heads, queries, keys)

    def programs(self, part: str, blocks: Blocks) -> int:
        if part == "backward_kv":
            return -(-self.keys // blocks.cols) * self.batch * self.kv_heads
        return -(-self.queries // blocks.rows) * self.batch * self.heads


@dataclass(frozen=True)
class Job:
    """One kernel, with all that a launch of it needs but tensors and block sizes."""

    spec: KernelSpec
    part: str
    arguments: tuple[Any, ...]
    """In the kernel's order: numbers, None, and `Described` for tensors."""
    sizes: Sizes
    index: str
    products: str
    device: str
    """As torch names it."""
    target: tuple[str, Any, int]
    """Triton's backend, architecture, threads of a warp."""

    @classmethod
    def of(
        cls,
        call: AttentionCall,
        part: str,
        names: Sequence[str],
        arguments: Mapping[str, Any],
        index: str,
        products: str,
    ) -> Job:
        """Of a call on the current device of Triton's driver."""
        import triton

        target = triton.runtime.driver.active.get_current_target()
        values = (arguments[name] for name in names)
        spec = dataclasses.replace(call.spec)  # without what it has cached: a hash holds for one process
        return cls(
            spec, part, tuple(Described.of(x) if isinstance(x, Tensor) else x for x in values), Sizes.of(call),
            index, products, str(call.q.device), (target.backend, target.arch, target.warp_size),
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a process of `worker` is to do."""

    kind: Literal["compile", "measure"]
    job: Job
    candidates: tuple[Blocks, ...]
    effort: Effort
    within: str = ""
    """A context manager, `module:name`, to do it in: tests have no GPU."""
