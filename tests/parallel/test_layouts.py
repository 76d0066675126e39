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
from torch import Tensor, nn

Run = Callable[..., list[Any]]


def _steps(module: Any, parameters: nn.Module, pick: Callable[[Tensor], Tensor], positions: Tensor) -> None:
    optimiser = small.optimiser(parameters)
    for x, y in small.data():
        optimiser.zero_grad()
        (module(pick(x), positions) - pick(y)).square().mean().backward()
        optimiser.step()


def _alone(kind: str) -> dict[str, Tensor]:
    """The parameters after three steps of one process that calls k-NN attention itself."""
    module = small.model(kind, by_hand=True)
    _steps(module, module, lambda x: x, torch.arange(16))
    return {name: x.detach() for name, x in module.named_parameters()}


def _full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _clean(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def _same(module: nn.Module, expected: dict[str, Tensor], **close: float) -> None:
    found = {_clean(name): _full(x.detach()) for name, x in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, **(close or {"atol": 2e-5, "rtol": 1e-4}), msg=lambda m, n=name: f"{n}: {m}"
        )


def _my_batch(rank: int, ranks: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(ranks)[rank]


def _compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, backend="kvt", options=small.OPTIONS | options)


# ---- data parallelism ------------------------------------------------------------------------------------------------


def check_ddp(kind: str, outside: bool) -> None:
    from torch.nn.parallel import DistributedDataParallel

    expected, module = _alone(kind), small.model(kind)
    if outside:
        runs: Any = _compiled(DistributedDataParallel(module))
    else:
        runs = DistributedDataParallel(_compiled(module))
    _steps(runs, module, _my_batch(dist.get_rank(), 2), torch.arange(16))
    _same(module, expected)


@pytest.mark.parametrize("outside", [True, False], ids=["compiled outside", "compiled inside"])
def test_ddp(run: Run, outside: bool) -> None:
    run(2, check_ddp, "llama" if outside else "vit", outside)


def check_fsdp(kind: str, compiled: str, checkpointing: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected, module, mesh = _alone(kind), small.model(kind), init_device_mesh("cpu", (2,))
    for n, block in enumerate(module.blocks):
        wrapped = checkpoint_wrapper(block) if checkpointing else block
        if compiled == "by block":
            wrapped = _compiled(wrapped)
        module.blocks[n] = wrapped
        fully_shard(wrapped, mesh=mesh)
    fully_shard(module, mesh=mesh)
    runs = _compiled(module) if compiled == "whole" else module
    _steps(runs, module, _my_batch(dist.get_rank(), 2), torch.arange(16))
    _same(module, expected)


@pytest.mark.parametrize(
    ("kind", "compiled", "checkpointing"),
    [("vit", "by block", True), ("llama", "by block", False), ("llama", "whole", False)],
)
def test_fsdp(run: Run, kind: str, compiled: str, checkpointing: bool) -> None:
    run(2, check_fsdp, kind, compiled, checkpointing)


def check_mixed_precision() -> None:
    """A step in bfloat16 on each half of the batch: the gradients of two processes that average by hand."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x, y = small.data()[0]
    expected: dict[str, Tensor] = {}
    for half in range(2):
        low = small.model("vit", by_hand=True).bfloat16()
        pick = _my_batch(half, 2)
        (low(pick(x).bfloat16(), torch.arange(16)) - pick(y)).square().mean().backward()
        for name, p in low.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.float() / 2
    module, mesh = small.model("vit"), init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for n, block in enumerate(module.blocks):
        module.blocks[n] = fully_shard(_compiled(block), mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    pick = _my_batch(dist.get_rank(), 2)
    (module(pick(x), torch.arange(16)) - pick(y)).square().mean().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(_full(p.grad), expected[_clean(name)], atol=2e-3, rtol=2e-2)


def test_fsdp_in_mixed_precision(run: Run) -> None:
    run(2, check_mixed_precision)


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def _tensor_parallel(module: nn.Module, mesh: Any, sequence: bool) -> None:
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


def check_tensor_parallel(kind: str, sequence: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    expected, module, mesh = _alone(kind), small.model(kind), init_device_mesh("cpu", (2,))
    _tensor_parallel(module, mesh, sequence)
    for n, block in enumerate(module.blocks):
        if sequence:  # torch 2.13 compiles no backward of norms under sequence parallelism, whatever the backend
            block.attn.compile(backend="kvt", options=small.OPTIONS)
        else:
            module.blocks[n] = _compiled(block)
    _steps(module, module, lambda x: x, torch.arange(16))
    _same(module, expected)


@pytest.mark.parametrize(("kind", "sequence"), [("vit", False), ("llama", False), ("llama", True)])
def test_tensor_parallel(run: Run, kind: str, sequence: bool) -> None:
    run(2, check_tensor_parallel, kind, sequence)


def check_fsdp_of_tensor_parallel(kind: str, folder: str) -> None:
    """And its checkpoint, read under another layout."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected, module = _alone(kind), small.model(kind)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(module, mesh["tp"], False)
    for block in module.blocks:
        block.compile(backend="kvt", options=small.OPTIONS)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    _steps(module, module, _my_batch(mesh.get_local_rank("dp"), 2), torch.arange(16))
    _same(module, expected)
    dcp.save(get_model_state_dict(module), checkpoint_id=folder)
    other, flat = small.Model(kind), init_device_mesh("cpu", (4,))
    for block in other.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(other, mesh=flat)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    _same(other, expected)


def test_fsdp_of_tensor_parallel_and_its_checkpoint(run: Run, tmp_path: Path) -> None:
    run(4, check_fsdp_of_tensor_parallel, "llama", str(tmp_path / "checkpoint"))


# ---- context parallelism ---------------------------------------------------------------------------------------------


def check_context_parallel(kind: str, order: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from kvt_compile.parallel import context_parallel

    expected, module = _alone(kind), small.model(kind)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    everybody = init_device_mesh("cpu", (4,))
    for block in module.blocks:
        block.compile(backend="kvt", options={"topk": 5, "then": "aot_eager"})
        fully_shard(block, mesh=everybody)
    fully_shard(module, mesh=everybody)
    with context_parallel(mesh, "cp", order=order) as context:
        batch = _my_batch(mesh.get_local_rank("dp"), 2)
        _steps(module, module, lambda x: context.shard(batch(x), 1), context.positions(8))
    _same(module, expected)


@pytest.mark.parametrize(("kind", "order"), [("vit", "contiguous"), ("llama", "balanced")])
def test_context_parallel_with_fsdp(run: Run, kind: str, order: str) -> None:
    run(4, check_context_parallel, kind, order)


# ---- k that changes, and caches --------------------------------------------------------------------------------------


def check_schedule() -> None:
    from torch.nn.parallel import DistributedDataParallel

    import kvt_compile

    def trained(distributed: bool) -> nn.Module:
        model = small.model("vit")
        optimiser, pick = small.optimiser(model), _my_batch(dist.get_rank(), 2) if distributed else lambda x: x
        rewritten: Any = kvt_compile.rewrite(
            model, pick(small.data()[0][0]), torch.arange(16), topk=12, lowering="aten"
        ).module
        runs = DistributedDataParallel(rewritten) if distributed else rewritten
        for topk, (x, y) in zip((12, 0.5, {"blocks.0.*": 3}), small.data(), strict=True):
            kvt_compile.set_topk(rewritten, topk)
            optimiser.zero_grad()
            (runs(pick(x), torch.arange(16)) - pick(y)).square().mean().backward()
            optimiser.step()
        return model

    _same(trained(distributed=True), dict(trained(distributed=False).named_parameters()))


def test_a_schedule_of_k_under_ddp(run: Run) -> None:
    run(2, check_schedule)


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
