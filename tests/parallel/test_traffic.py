"""What travels is what docs/many_machines.md says: bytes counted at the collectives against the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from traffic import counted, received

import kvt_compile  # noqa: F401 - its operators, on the ranks that import this file

Run = Callable[..., list[Any]]
SIZES = {"B": 2, "Hq": 4, "Hk": 2, "N": 16, "D": 8, "Dv": 6, "e": 4}
SHAPES = ((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 6))


def _attend(q: Tensor, k: Tensor, v: Tensor, lowering: str) -> Tensor:
    return torch.ops.kvt.attention(q, k, v, [], "0.3*s", "p", 4, [], 0.0, None, lowering)[0]


def check_context(way: str, dtype: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from kvt_compile.kernels import lowerings
    from kvt_compile.parallel import context_parallel

    ranks = dist.get_world_size()
    with context_parallel(init_device_mesh("cpu", (ranks,)), way=way) as context:
        mine = [context.shard(torch.randn(shape).to(getattr(torch, dtype)), 2).requires_grad_() for shape in SHAPES]
        _attend(*mine, lowerings.inside().lowering)  # the first call also compares the ranks
        with counted() as forward:
            out = _attend(*mine, lowerings.inside().lowering)
        with counted() as backward:
            out.backward(torch.ones_like(out))
    sizes = SIZES | {"e": getattr(torch, dtype).itemsize}
    assert forward.received == received(way, ranks, sizes, backward=False), forward.calls
    assert backward.received == received(way, ranks, sizes, backward=True), backward.calls


@pytest.mark.parametrize("way", ["gather", "count"])
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (2, "bfloat16"), (4, "float32")])
def test_context_parallelism(run: Run, way: str, ranks: int, dtype: str) -> None:
    run(ranks, check_context, way, dtype)


def check_dtensors(layout: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    at = {
        "batch": (Shard(0),) * 3,
        "heads": (Shard(1),) * 3,
        "rows": (Shard(2), Replicate(), Replicate()),
        "sequence": (Shard(2),) * 3,
    }[layout]
    lying = [
        distribute_tensor(torch.randn(shape), mesh, [p]).requires_grad_() for shape, p in zip(SHAPES, at, strict=True)
    ]
    with counted() as forward:
        out = _attend(*lying, "aten")
    grad = distribute_tensor(torch.ones(out.shape), mesh, out.placements)
    with counted() as backward:
        out.backward(grad)
        if layout == "sequence":
            for x, p in zip(lying[1:], at[1:], strict=True):
                x.grad.redistribute(placements=[p])
    assert forward.received == received(layout, ranks, SIZES, backward=False), forward.calls
    assert backward.received == received(layout, ranks, SIZES, backward=True), backward.calls


@pytest.mark.parametrize(
    ("layout", "ranks"), [("batch", 2), ("heads", 2), ("rows", 2), ("rows", 4), ("sequence", 2), ("sequence", 4)]
)
def test_dtensors(run: Run, layout: str, ranks: int) -> None:
    run(ranks, check_dtensors, layout)


def check_turned() -> None:
    """Four examples on four ranks: each computes one, as q, k and v by examples are fewer bytes than all keys."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, ranks = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    cut = [distribute_tensor(torch.randn(4, *shape[1:]), mesh, [Shard(2)]) for shape in SHAPES]
    with counted() as forward:
        out = _attend(*cut, "aten")
    assert out.placements == (Shard(0),)
    # gloo has no all-to-all: DTensor gathers there and keeps a part
    assert forward.received == ranks * received("turned", ranks, SIZES | {"B": 4}, backward=False), forward.calls


def test_dtensors_that_are_turned_to_the_batch(run: Run) -> None:
    run(4, check_turned)


def check_dropout() -> None:
    """The seed of the first rank travels, forward and backward."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, ranks = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    q, k, v = (distribute_tensor(torch.randn(shape), mesh, [Shard(0)]).requires_grad_() for shape in SHAPES)
    with counted() as forward:
        out = torch.ops.kvt.attention(q, k, v, [], "0.3*s", "p", 4, [], 0.5, torch.tensor([3]), "aten")[0]
    with counted() as backward:
        out.backward(distribute_tensor(torch.ones(out.shape), mesh, out.placements))
    assert forward.received == backward.received == 2 * (ranks - 1) / ranks * 8


def test_dropout_of_dtensors(run: Run) -> None:
    run(2, check_dropout)
