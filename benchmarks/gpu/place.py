"""The GPU and its clock; in a dry run the tests' stub driver, which accepts every launch and runs nothing, and CPU
tensors.

On the stub the lowering "triton" takes CPU tensors and is what "auto" chooses, so that a step needs no second way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvt_compile.kernels.tune.timing import Clock, DeviceClock, Run, WallClock

HELPERS = Path(__file__).resolve().parents[2] / "tests" / "helpers"
TARGET = "sm_90"
"""What the stub seems to be."""


class NoClock(WallClock):
    """Runs what is to be timed once; its times say nothing and are never written."""

    def milliseconds(self, run: Run) -> float:
        run()
        return 1.0


@dataclass(frozen=True)
class Place:
    """Where kernels run."""

    device: torch.device
    clock: Clock
    stub: Any = None
    """`stub_gpu.Stub` of a dry run."""

    @property
    def launches(self) -> int:
        """How many the stub has accepted so far; 0 on a GPU, which does not tell."""
        return self.stub.launches if self.stub is not None else 0

    @property
    def real(self) -> bool:
        """Whether kernels compute here."""
        return self.stub is None


@contextmanager
def place(dry: bool) -> Iterator[Place]:
    """Raises RuntimeError where there is no GPU and the run is not dry, and where there is one and it is."""
    if not dry:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no GPU here: run on a machine that has one, or dry")
        device = torch.device("cuda", torch.cuda.current_device())
        yield Place(device, DeviceClock(device, lead_ms=1.0))
        return
    sys.path.append(str(HELPERS))
    import stub_gpu

    with stub_gpu.stub(TARGET) as stub, stub.registered():
        yield Place(torch.device("cpu"), NoClock(), stub)
