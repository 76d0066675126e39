"""Three optimiser steps of a model under some layout, and what one process has after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import parallel_models as small
import torch
from torch import Tensor, nn

Topks = tuple[float | None, ...]
"""Of each block: an int, a share, None for all."""


def steps(
    module: Any,
    parameters: nn.Module,
    pick: Callable[[Tensor], Tensor],
    positions: Tensor,
    before: Callable[[int], None] = lambda step: None,
    *,
    optimiser: torch.optim.Optimizer | None = None,
    which: slice = slice(None),
) -> None:
    """pick: this rank's part of a batch or sequence.  before: called with the number of each step."""
    optimiser = optimiser or small.optimiser(parameters)
    for step, (x, y) in list(enumerate(small.data()))[which]:
        before(step)
        optimiser.zero_grad()
        (module(pick(x), positions) - pick(y)).square().mean().backward()
        optimiser.step()


def alone(kind: str, schedule: Sequence[Topks] = (small.TOPKS,) * 3) -> dict[str, Tensor]:
    """The parameters after three steps of one process that calls k-NN attention itself; a k for each block a step."""
    module = small.model(kind, by_hand=True)

    def before(step: int) -> None:
        for block, topk in zip(module.blocks, schedule[step], strict=True):
            block.attn.topk = topk

    steps(module, module, lambda x: x, torch.arange(16), before)
    return {name: x.detach() for name, x in module.named_parameters()}


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def clean(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def same(module: nn.Module, expected: dict[str, Tensor], **close: float) -> None:
    found = {clean(name): full(x.detach()) for name, x in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, **(close or {"atol": 2e-5, "rtol": 1e-4}), msg=lambda m, n=name: f"{n}: {m}"
        )


def my_batch(rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(ranks)[rank]


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, backend="kvt", options=small.OPTIONS | options)


def tensor_parallel(module: nn.Module, mesh: Any, sequence: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    along = Shard(1) if sequence else Replicate()
    for block in module.blocks:
        plan: dict[str, Any] = {
            **{f"attn.w{x}": ColwiseParallel() for x in "qkv"},
            "attn.wo": RowwiseParallel(output_layouts=along),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=along),
        }
        if sequence:
            plan |= {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                "attn": PrepareModuleInput(
                    input_layouts=(along, None), desired_input_layouts=(Replicate(), None), use_local_output=True
                ),
                "mlp": PrepareModuleInput(
                    input_layouts=(along,), desired_input_layouts=(Replicate(),), use_local_output=True
                ),
            }
        parallelize_module(block, mesh, plan)
    if sequence:
        parallelize_module(
            module,
            mesh,
            {
                "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=along),
                "head": ColwiseParallel(input_layouts=along, output_layouts=Replicate()),
            },
        )
