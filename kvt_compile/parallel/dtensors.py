"""Tensors of a call -> DTensors of one mesh, their shards as a layout wants them, and results -> DTensors again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement


def mesh_of(op: str, tensors: Sequence[Tensor | None]) -> DeviceMesh:
    """The mesh that all DTensors of a call lie on.  Raises RuntimeError where they lie on different ones."""
    meshes = [x.device_mesh for x in tensors if isinstance(x, DTensor)]
    for mesh in meshes:
        if mesh != meshes[0]:
            raise RuntimeError(
                f"kvt::{op}: its DTensors lie on different meshes, {meshes[0]} and {mesh}, expected one; redistribute "
                "or slice the mesh (mesh['tp']) so that all of them share it"
            )
    return meshes[0]


def on_mesh(op: str, name: str, x: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor of a call as a DTensor: a number is the same on every rank, any other plain tensor is refused as torch's
    own operators refuse it.  Raises RuntimeError."""
    if isinstance(x, DTensor):
        return x
    implicit = getattr(getattr(DTensor, "_op_dispatcher", None), "_allow_implicit_replication", False)
    if x.numel() == 1 or implicit:
        # gradients are the op's own (and DTensor has no rule for what autograd does in torch 2.11)
        return DTensor.from_local(x.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    _refuse_mixed(op, name, x)


def _refuse_mixed(op: str, name: str, x: Tensor) -> NoReturn:
    raise RuntimeError(
        f"kvt::{op}: got mixed torch.Tensor and DTensor: {name} is a torch.Tensor of shape {tuple(x.shape)}, expected "
        "a DTensor like the others. A tensor that is the same on every rank becomes one by DTensor.from_local(x, mesh, "
        "[Replicate()]), or under torch.distributed.tensor.experimental.implicit_replication()"
    )


def shard(x: DTensor, placements: Sequence[Placement]) -> Tensor:
    """What a rank has of a tensor once it lies as asked."""
    # gradients are the op's own, and in torch 2.11 nothing that needs one can be redistributed here
    x = cast(DTensor, x.detach())
    moved = x if x.placements == tuple(placements) else x.redistribute(x.device_mesh, placements)
    return moved.to_local()


def whole(local: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A rank's part of a contiguous result of that global shape -> the result."""
    size = torch.Size(shape)
    stride = tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def agreed(seed: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """The seed of the first rank of the mesh: ranks whose generators have drifted apart still draw one mask."""
    if seed is None:
        return None
    if isinstance(seed, DTensor):
        return shard(seed, [Replicate()] * seed.device_mesh.ndim)
    if mesh.size() == 1:
        return seed
    mine = seed if not any(mesh.get_coordinate() or ()) else torch.zeros_like(seed)
    summed = DTensor.from_local(mine, mesh, [Partial()] * mesh.ndim, run_check=False)
    return shard(summed, [Replicate()] * mesh.ndim)
