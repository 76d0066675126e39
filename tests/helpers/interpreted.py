"""The Triton lowering on CPU tensors, in Triton's interpreter, with small tiles: registered as "triton interpreted".

Tiles are as small as a matrix instruction allows, so that small shapes still take several, and ragged, ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import power_of_two
from kvt_compile.kernels.triton.choose import Launch
from kvt_compile.kernels.triton.interpret import interpreted
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.lowering import TritonLowering

NAME = "triton interpreted"


class Recorder:
    """Chooses the block sizes, and notes for which kernels it was asked."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.asked: list[str] = []

    def __call__(self, launch: Launch) -> Blocks:
        self.asked.append(launch.part)
        if self.kind == "resident" and launch.part in ("forward", "softmax"):
            return Blocks("resident", 16, power_of_two(launch.keys), 4, 1)
        return Blocks("streaming", 16, 16, 4, 1)


@contextmanager
def triton_on_cpu(kind: str) -> Iterator[Recorder]:
    """Register the lowering; `kind` is that of the forward: "resident" or "streaming"."""
    recorder = Recorder(kind)
    undo = lowerings.register(NAME, TritonLowering(Launcher(True, recorder), interpreted, ("cpu",)))
    try:
        yield recorder
    finally:
        undo()
