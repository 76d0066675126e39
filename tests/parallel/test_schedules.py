"""A k that changes from step to step and from block to block, under every layout: the parameters of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import parallel_models as small
import pytest
import torch
import torch.distributed as dist
from parallel_steps import alone, compiled, my_batch, same, steps, tensor_parallel
from torch import Tensor, nn

Run = Callable[..., list[Any]]
SCHEDULE: tuple[tuple[float | None, ...], ...] = ((12, 12), (0.5, 0.5), (3, None))


# ---- set_topk --------------------------------------------------------------------------------------------------------


def _rewritten(module: nn.Module, x: Tensor, positions: Tensor) -> None:
    """Each block by itself, in place, with a k that can be set."""
    import kvt_compile

    hidden, turn = module.embed(x), small.turns(positions) if module.causal else None
    for n, block in enumerate(module.blocks):
        module.blocks[n] = kvt_compile.rewrite(block, hidden, turn, topk=12, force_rewrite=True).module


def _set(module: nn.Module) -> Callable[[int], None]:
    import kvt_compile

    def before(step: int) -> None:
        for block, topk in zip(module.blocks, SCHEDULE[step], strict=True):
            kvt_compile.set_topk(block, topk)

    return before


def check_set_topk(layout: str, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from kvt_compile.parallel import context_parallel

    expected, module = alone(kind, SCHEDULE), small.model(kind)
    runs: Any = module
    x, positions, ranks = small.data()[0][0], torch.arange(16), dist.get_world_size()
    if layout == "context and fsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "cp"))
        batch = my_batch(mesh.get_local_rank("dp"), 2)
        with context_parallel(mesh, "cp", order="balanced") as context:
            mine = context.positions(16 // context.ring.ranks)
            _rewritten(module, context.shard(batch(x), 1), mine)
            for block in (*module.blocks, module):
                fully_shard(block, mesh=init_device_mesh("cpu", (ranks,)))
            steps(module, module, lambda y: context.shard(batch(y), 1), mine, _set(module))
        return same(module, expected)
    batch = my_batch(dist.get_rank(), ranks)
    _rewritten(module, batch(x), positions)
    if layout == "ddp":
        runs = DistributedDataParallel(module)
    else:
        for block in (*module.blocks, module):
            fully_shard(block)
    steps(runs, module, batch, positions, _set(module))
    same(module, expected)


@pytest.mark.parametrize(
    ("ranks", "layout", "kind"), [(2, "ddp", "vit"), (2, "fsdp", "llama"), (4, "context and fsdp", "llama")]
)
def test_a_schedule_of_k(run: Run, ranks: int, layout: str, kind: str) -> None:
    run(ranks, check_set_topk, layout, kind)


# ---- policies --------------------------------------------------------------------------------------------------------

POLICY = {"*blocks.0*": 3, "*blocks.1*": 0.5}


def check_policy(layout: str) -> None:
    """By the paths of modules, as wrappers leave them."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    expected, module = alone("vit", ((3, 0.5),) * 3), small.model("vit")
    if layout == "ddp, outside":
        runs: Any = compiled(DistributedDataParallel(module), topk=POLICY)
    elif layout == "ddp, inside":
        runs = DistributedDataParallel(compiled(module, topk=POLICY))
    else:
        for block in (*module.blocks, module):
            fully_shard(block)
        runs = compiled(module, topk=POLICY)
    steps(runs, module, my_batch(dist.get_rank(), 2), torch.arange(16))
    same(module, expected)


@pytest.mark.parametrize("layout", ["ddp, outside", "ddp, inside", "fsdp"])
def test_a_policy_by_paths(run: Run, layout: str) -> None:
    run(2, check_policy, layout)


# ---- what has k in its code ------------------------------------------------------------------------------------------


def check_compiled_again(layout: str, kind: str) -> None:
    """What `torch.compile` made has k in its code, and what `rewrite` made the number of heads: where heads are cut,
    another k compiles anew."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    schedule = (SCHEDULE[0], SCHEDULE[0], (3, 0.5))
    expected, module, ranks = alone(kind, schedule), small.model(kind), dist.get_world_size()
    sequence, pick = layout == "tensor and sequence", my_batch(0, 1)
    if layout == "fsdp of tensor":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(module, mesh["tp"], False)
        for block in (*module.blocks, module):
            fully_shard(block, mesh=mesh["dp"])
        pick = my_batch(mesh.get_local_rank("dp"), 2)
    else:
        tensor_parallel(module, init_device_mesh("cpu", (ranks,)), sequence)

    def before(step: int) -> None:
        if step == 1:
            return
        torch.compiler.reset()
        for block, topk in zip(module.blocks, schedule[step], strict=True):
            part = block.attn if sequence else block
            part.compile(backend="kvt", options=small.OPTIONS | {"topk": topk})

    steps(module, module, pick, torch.arange(16), before)
    same(module, expected)


@pytest.mark.parametrize(
    ("ranks", "layout", "kind"),
    [(2, "tensor", "vit"), (2, "tensor and sequence", "llama"), (4, "fsdp of tensor", "llama")],
)
def test_a_schedule_where_heads_are_cut(run: Run, ranks: int, layout: str, kind: str) -> None:
    run(ranks, check_compiled_again, layout, kind)
