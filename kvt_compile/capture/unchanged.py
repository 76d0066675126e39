"""A model that is run to look at it is as it was before: buffers and random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and random state as they were, after the model ran."""
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    # one that did not change may be impossible to write to: an expanded table, say
                    if name in kept and not torch.equal(buffer, kept[name]):
                        buffer.copy_(kept[name])
