"""What a worker process runs within, instead of beside a GPU: the stub driver, sound or with a fault, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stub_gpu import stub


@contextmanager
def sound() -> Iterator[None]:
    with stub("sm_90"):
        yield


@contextmanager
def faulty() -> Iterator[None]:
    """A kernel of 8 warps ends the process, as a fault that takes the CUDA context with it does."""
    with stub("sm_90") as gpu:
        gpu.library.stub_fault_at(8 * 32)
        yield


@contextmanager
def absent() -> Iterator[None]:
    raise RuntimeError("no GPU for this process")
    yield
