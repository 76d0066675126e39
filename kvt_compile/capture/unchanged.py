"""A model that is run to look at it is as it was before: buffers and random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics, tables made at the first call) and random state as before, after the model ran."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in kept:
                    # one that did not change may be impossible to write to: an expanded table, say
                    if not _equal(buffer, before):
                        buffer.copy_(before)
                    # a model may put another in its place, of another size
                    if module._buffers.get(name) is not buffer:
                        module._buffers[name] = buffer


_COLUMNS, _ROWS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COLUMNS, torch.sparse_bsr: _COLUMNS, torch.sparse_csc: _ROWS, torch.sparse_bsc: _ROWS,
}  # fmt: skip


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """torch.equal, of sparse tensors too: those are the same if their parts are."""
    if x.layout is torch.strided or x.layout is not y.layout or x.layout not in _PARTS:
        return torch.equal(x, y) if x.layout is torch.strided else False
    parts = _PARTS[x.layout]
    return x.shape == y.shape and all(torch.equal(getattr(x, part)(), getattr(y, part)()) for part in parts)
