"""Three optimiser steps of two models under every layout that users run: the parameters of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_models as small
import pytest
import torch
import torch.distributed as dist
from parallel_steps import alone, compiled, my_batch, same, steps, tensor_parallel
from torch import Tensor, nn

Run = Callable[..., list[Any]]


# ---- data parallelism ------------------------------------------------------------------------------------------------


def check_ddp(kind: str, outside: bool) -> None:
    from torch.nn.parallel import DistributedDataParallel

    expected, module = alone(kind), small.model(kind)
    if outside:
        runs: Any = compiled(DistributedDataParallel(module))
    else:
        runs = DistributedDataParallel(compiled(module))
    steps(runs, module, my_batch(dist.get_rank(), 2), torch.arange(16))
    same(module, expected)


@pytest.mark.parametrize("outside", [True, False], ids=["compiled outside", "compiled inside"])
def test_ddp(run: Run, outside: bool) -> None:
    run(2, check_ddp, "llama" if outside else "vit", outside)


def check_fsdp(kind: str, how: str, checkpointing: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected, module, mesh = alone(kind), small.model(kind), init_device_mesh("cpu", (2,))
    for n, block in enumerate(module.blocks):
        wrapped = checkpoint_wrapper(block) if checkpointing else block
        if how == "by block":
            wrapped = compiled(wrapped)
        module.blocks[n] = wrapped
        fully_shard(wrapped, mesh=mesh)
    fully_shard(module, mesh=mesh)
    runs = compiled(module) if how == "whole" else module
    steps(runs, module, my_batch(dist.get_rank(), 2), torch.arange(16))
    same(module, expected)


@pytest.mark.parametrize(
    ("kind", "how", "checkpointing"),
    [("vit", "by block", True), ("llama", "by block", False), ("llama", "whole", False), ("vit", "whole", True)],
)
def test_fsdp(run: Run, kind: str, how: str, checkpointing: bool) -> None:
    run(2, check_fsdp, kind, how, checkpointing)


def check_mixed_precision() -> None:
    """Parameters in float32, steps in bfloat16 on each half of the batch: what two do that average by hand."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    alone, optimiser = small.model("vit"), None
    optimiser = small.optimiser(alone)
    for x, y in small.data():
        halves: dict[str, Tensor] = {}
        for half in range(2):
            low = small.model("vit", by_hand=True).bfloat16()
            low.load_state_dict(alone.state_dict())  # rounds
            pick = my_batch(half, 2)
            (low(pick(x).bfloat16(), torch.arange(16)) - pick(y)).square().mean().backward()
            for name, p in low.named_parameters():
                halves[name] = halves.get(name, 0) + p.grad.float() / 2
        for name, p in alone.named_parameters():
            p.grad = halves[name]
        optimiser.step()
    module, mesh = small.model("vit"), init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for n, block in enumerate(module.blocks):
        module.blocks[n] = fully_shard(compiled(block), mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    steps(module, module, my_batch(dist.get_rank(), 2), torch.arange(16))
    same(module, dict(alone.named_parameters()), atol=2e-3, rtol=2e-2)


def test_fsdp_in_mixed_precision(run: Run) -> None:
    run(2, check_mixed_precision)


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def check_tensor_parallel(kind: str, sequence: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    expected, module, mesh = alone(kind), small.model(kind), init_device_mesh("cpu", (2,))
    tensor_parallel(module, mesh, sequence)
    for n, block in enumerate(module.blocks):
        if sequence:  # torch 2.13 compiles no backward of norms under sequence parallelism, whatever the backend
            block.attn.compile(backend="kvt", options=small.OPTIONS)
        else:
            module.blocks[n] = compiled(block)
    steps(module, module, lambda x: x, torch.arange(16))
    same(module, expected)


@pytest.mark.parametrize(("kind", "sequence"), [("vit", False), ("llama", False), ("llama", True)])
def test_tensor_parallel(run: Run, kind: str, sequence: bool) -> None:
    run(2, check_tensor_parallel, kind, sequence)


def check_whole_blocks() -> tuple[str, str]:
    """How a step ends in which whole blocks are compiled under sequence parallelism: by a backend of torch, by ours."""
    from torch.distributed.device_mesh import init_device_mesh

    ends = []
    for how in ({"backend": "aot_eager"}, {"backend": "kvt", "options": small.OPTIONS}):
        torch.compiler.reset()
        module = small.model("llama")
        tensor_parallel(module, init_device_mesh("cpu", (2,)), True)
        for block in module.blocks:
            block.compile(**how)
        try:
            steps(module, module, lambda x: x, torch.arange(16))
        except Exception as error:
            ends.append(str(error))
        else:
            ends.append("well")
    if ends[1] == "well":
        same(module, alone("llama"))
    return ends[0], ends[1]


def test_whole_blocks_under_sequence_parallelism_end_as_torch_s_own_backends(run: Run) -> None:
    for theirs, ours in run(2, check_whole_blocks):
        assert (theirs == "well") == (ours == "well"), ours
        if torch.__version__.startswith("2.13."):  # docs/many_machines.md
            assert "has no attribute '_local_tensor'" in theirs
            assert "has no attribute '_local_tensor'" in ours


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _under(layout: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Lays a model out; which part of a batch this rank takes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    data, tensor = {"fsdp": (ranks, 1), "tensor": (1, ranks), "fsdp of tensor": (2, ranks // 2)}[layout]
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("dp", "tp"))
    if tensor > 1:
        tensor_parallel(module, mesh["tp"], False)
    for block in module.blocks:
        block.compile(backend="kvt", options=small.OPTIONS)
    if data > 1:
        for part in (*module.blocks, module):
            fully_shard(part, mesh=mesh["dp"])
    return my_batch(mesh.get_local_rank("dp"), data)


def check_written(layout: str, kind: str, folder: str) -> None:
    """Two steps, a checkpoint, a third step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    expected, module = alone(kind), small.model(kind)
    pick, optimiser = _under(layout, module), small.optimiser(module)
    steps(module, module, pick, torch.arange(16), optimiser=optimiser, which=slice(2))
    dcp.save(dict(zip(("model", "optimiser"), get_state_dict(module, optimiser), strict=True)), checkpoint_id=folder)
    steps(module, module, pick, torch.arange(16), optimiser=optimiser, which=slice(2, 3))
    same(module, expected)


def check_read(layout: str, kind: str, folder: str) -> None:
    """The third step, under another layout."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.manual_seed(7)
    module = small.Model(kind)
    pick, optimiser = _under(layout, module), small.optimiser(module)
    state = dict(zip(("model", "optimiser"), get_state_dict(module, optimiser), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(module, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    steps(module, module, pick, torch.arange(16), optimiser=optimiser, which=slice(2, 3))
    same(module, alone(kind))


def test_a_run_goes_on_under_another_layout_and_on_fewer_ranks(run: Run, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    run(4, check_written, "fsdp of tensor", "llama", folder)
    run(2, check_read, "fsdp", "llama", folder)
    run(2, check_read, "tensor", "llama", folder)


# ---- context parallelism ---------------------------------------------------------------------------------------------


def check_context_parallel(kind: str, order: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from kvt_compile.parallel import context_parallel

    expected, module = alone(kind), small.model(kind)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    everybody = init_device_mesh("cpu", (4,))
    for block in module.blocks:
        block.compile(backend="kvt", options={"topk": 5, "then": "aot_eager"})
        fully_shard(block, mesh=everybody)
    fully_shard(module, mesh=everybody)
    with context_parallel(mesh, "cp", order=order) as context:
        batch = my_batch(mesh.get_local_rank("dp"), 2)
        steps(module, module, lambda x: context.shard(batch(x), 1), context.positions(8))
    same(module, expected)


@pytest.mark.parametrize(("kind", "order"), [("vit", "contiguous"), ("llama", "balanced")])
def test_context_parallel_with_fsdp(run: Run, kind: str, order: str) -> None:
    run(4, check_context_parallel, kind, order)


# ---- caches ---------------------------------------------------------------------------------------------------------


def check_one_cache(folder: str) -> list[str]:
    """Every rank builds the same kernels at the same time, into one folder."""
    os.environ["KVT_CACHE_DIR"] = folder
    q = torch.randn(1, 2, 20, 8)
    dist.barrier()
    for n in range(3):
        torch.ops.kvt.attention(q, q, q, [], f"0.{n + 1}*s", "p", 4, [], 0.0, None, "auto")
    del os.environ["KVT_CACHE_DIR"]
    return sorted(path.name for path in Path(folder).rglob("*.so"))


def test_ranks_that_build_at_once_share_a_cache(run: Run, tmp_path: Path) -> None:
    run(2, check_one_cache, str(tmp_path))
    run(2, check_one_cache, str(tmp_path))
    assert not list(tmp_path.rglob("*.tmp*"))
