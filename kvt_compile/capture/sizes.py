"""The sizes a graph was read with -> a module in it that refuses inputs of others.

    x [2, 6, 8] of a symbolic trace   ->   kvt_sizes(x): [5, 6, 8] passes, [2, 9, 8] is an error

A symbolic trace runs with inputs of any size, while k, indices and numbers computed of sizes (`N ** -0.5`) were read as
those of the example.  torch.export and Dynamo check sizes by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from kvt_compile.passes.canonical.values import meta_value

NAME = "kvt_sizes"
Sizes = tuple[int | None, ...]
"""None: may be any."""


class SameSizes(nn.Module):
    """Passes nothing on; raises ValueError for a tensor of other sizes than those that were read."""

    _is_impure = True  # nobody reads what it returns, and it must stay in the graph

    def __init__(self, names: tuple[str, ...], sizes: tuple[Sizes, ...]) -> None:
        super().__init__()
        self.names = names
        self.sizes = sizes

    def forward(self, *inputs: Tensor) -> None:
        for name, x, sizes in zip(self.names, inputs, self.sizes, strict=True):
            if not isinstance(x, fx.Proxy) and not _fit(x.shape, sizes):
                expected = ", ".join("*" if size is None else str(size) for size in sizes)
                raise ValueError(
                    f"input {name} has shape {tuple(x.shape)}, and this module was rewritten for ({expected}): k and "
                    "what stands between the products were read for these sizes, and only the first dimension may "
                    "differ, where the example's was at least 2. Rewrite the model with such an example, or use "
                    'torch.compile(model, backend="kvt"), which follows sizes'
                )


def _fit(shape: torch.Size, sizes: Sizes) -> bool:
    if len(shape) != len(sizes):
        return False
    return all(size is None or here == size for here, size in zip(shape, sizes, strict=True))


def _first(size: int | torch.SymInt, fused: bool) -> int | None:
    return size if fused and isinstance(size, int) and size < 2 else None


def _known(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else None


def check_sizes(gm: fx.GraphModule, fused: bool) -> None:
    """Puts the check behind the inputs of a graph, once.  Their first dimensions stay free, and those read as dynamic;
    where an attention was `fused`, a first dimension of 1 does not: nothing was read of a batch."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in placeholders if isinstance(meta_value(node), Tensor) and meta_value(node).dim() > 1]
    if hasattr(gm, NAME) or not tensors:
        return
    shapes = [meta_value(node).shape for node in tensors]
    sizes = tuple((_first(shape[0], fused), *map(_known, shape[1:])) for shape in shapes)
    gm.add_submodule(NAME, SameSizes(tuple(str(node.target) for node in tensors), sizes))
    with gm.graph.inserting_after(placeholders[-1]):
        node = gm.graph.call_module(NAME, tuple(tensors))
    node.meta["val"] = None
    gm.recompile()
