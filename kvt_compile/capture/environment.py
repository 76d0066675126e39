"""Where captures take place: one at a time, and in the same modes whatever the process is in.

fx patches `nn.Module` for the whole process while it traces, and torch.export sets flags that make torch.compile skip
in silence when two threads set them at once.  What it traces into is process-wide as
well: the sizes of another thread's fakes would be traced, so passes over a captured graph take the lock too.  (The
backend does not: Dynamo has a lock of its own, which `explain` takes after this one.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from kvt_compile.passes.canonical.modes import without_modes

LOCK = threading.RLock()


@contextmanager
def capturing() -> Iterator[None]:
    """With grad, as a model is built to run, and without the modes and hooks of whoever captures: a model captured
    under `torch.no_grad()` trains as one that was not."""
    with ExitStack() as stack:
        stack.enter_context(LOCK)
        stack.enter_context(without_modes())
        stack.enter_context(torch.enable_grad())
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # what a fake tensor saves is nobody's business
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield
