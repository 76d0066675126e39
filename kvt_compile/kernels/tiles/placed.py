"""Tensors that geometry decides -> the same on a device, kept for as long as anything may read them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_captured: dict[int, object] = {}
"""What CUDA graphs read: they know addresses, so these stay."""


def placed(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """Made on the CPU, whatever the default device is, and moved: by a thread of its own, as what stays must not lie in
    the memory that this thread may be allocating a CUDA graph's tensors from."""
    found: list[tuple[Tensor, ...]] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(tuple(x.to(device) for x in make()))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def stays(x: object, device: torch.device) -> None:
    """Where a CUDA graph is being captured it will read `x` at every replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[id(x)] = x
