"""A step of a causal model on several ranks against the same step on one: data, tensor or context parallelism.

torchrun --nproc-per-node 2 examples/many_ranks.py --layout context
python examples/many_ranks.py          (one process, which is a group of one)
"""

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import kvt_compile  # noqa: F401 - its operators, and with torch.compile the backend "kvt"
from kvt_compile.parallel import context_parallel

WIDTH, HEADS, TOKENS, OPTIONS = 64, 4, 32, {"topk": 8, "then": "aot_eager"}  # leave `then` out for speed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (w(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def model(device: str) -> nn.Module:
    torch.manual_seed(0)  # the same on every rank
    return nn.Sequential(Block(), Block()).to(device)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]


def step(module: nn.Module, x: Tensor, y: Tensor) -> None:
    (module(x) - y).square().mean().backward()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    parser.add_argument("--layout", default="data", choices=["data", "tensor", "context"])
    asked = parser.parse_args(arguments)
    device = "cuda" if asked.backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(asked.backend)
    else:
        dist.init_process_group(asked.backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,))
    torch.manual_seed(1)
    x, y = (torch.randn(2 * ranks, TOKENS, WIDTH, device=device) for _ in range(2))

    alone = model(device)
    step(torch.compile(alone, backend="kvt", options=OPTIONS), x, y)
    torch.compiler.reset()

    module = model(device)
    for block in module:
        block.compile(backend="kvt", options=OPTIONS)
    if asked.layout == "tensor":
        for block in module:
            heads = {f"w{name}": ColwiseParallel() for name in "qkv"}
            parallelize_module(block, mesh, heads | {"wo": RowwiseParallel()})
        step(module, x, y)
    else:
        for block in module:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        if asked.layout == "data":
            step(module, x.chunk(ranks)[rank], y.chunk(ranks)[rank])
        else:
            with context_parallel(mesh, order="balanced") as context:
                step(module, context.shard(x, 1), context.shard(y, 1))

    for mine, expected in zip(gradients(module), gradients(alone), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-3)
    if rank == 0:
        print(f"{asked.layout} over {ranks} ranks of {asked.backend}: the gradients are those of one process")
    dist.barrier()  # a rank that leaves while another still talks to it would end that one
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
