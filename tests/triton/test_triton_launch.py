"""Triton's launch path without a GPU: every kernel is bound, compiled, assembled, loaded and launched on a stub driver.

By default a few dozen kernels, every kind at least once; with -m slow all default configurations on all NVIDIA targets
and all that the GPU tests launch.  The second half breaks what the first one relies on, one thing at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from spec_calls import call_of
from stub_gpu import Stub, stub
from triton_specs import SPECS, VIT

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.module import load
from kvt_compile.kernels.triton.targets import parts_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launched for real by test_triton_gpu.py")
SMALL = Blocks("streaming", 16, 16, 4, 1)


@pytest.fixture
def gpu() -> Iterator[Stub]:
    with stub("sm_90") as found:
        yield found


def run(gpu: Stub, call: AttentionCall, launcher: Launcher | None = None) -> None:
    """Launch every kernel that a call has: of the forward, or of the backward."""
    launcher, before = launcher or Launcher(), gpu.launches
    if not call.spec.needs_grad:
        launcher.forward(call)
    else:
        out = call.q.new_zeros((*call.rows, call.v.shape[3]), dtype=call.v.dtype)
        rows = call.q.new_zeros(call.rows, dtype=call.spec.accumulate)
        launcher.backward(call, torch.zeros_like(out), out, rows, rows)
    assert gpu.launches - before == len(parts_of(call.spec))


def softmax(gpu: Stub, spec: SoftmaxSpec, shape: Sequence[int], dim: int = -1) -> None:
    """Launch both row kernels of a spec."""
    dtypes = getattr(torch, spec.dtype), getattr(torch, spec.out_dtype)
    lowering, before = gpu.lowering(), gpu.launches
    weights = lowering.softmax(torch.zeros(shape, dtype=dtypes[0]), dim % len(shape), 5, dtypes[1])
    lowering.softmax_backward(torch.zeros_like(weights), weights, dim % len(shape), dtypes[0])
    assert gpu.launches - before == 2


# --- what is launched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_every_part_of_the_templates(name: str, gpu: Stub) -> None:
    spec = SPECS[name]
    if isinstance(spec, SoftmaxSpec):
        softmax(gpu, spec, (3, 5, 7))
    else:
        run(gpu, call_of(spec, 70, 90))


# --- what must be caught ----------------------------------------------------------------------------------------------


class Changed(Launcher):
    """Launches kernels whose source was changed."""

    def __init__(self, *changes: tuple[str, str]) -> None:
        super().__init__(chooser=lambda launch: SMALL)
        self.changes = changes

    def kernel(self, spec: KernelSpec | SoftmaxSpec, part: str) -> Any:
        text = module_source(spec)
        for old, new in self.changes:
            assert old in text
            text = text.replace(old, new)
        return getattr(load(text), part)


REAL = "REAL = tl.constexpr(tl.float32)"
NAN = 'float("nan")'


def test_a_global_that_does_not_equal_itself_is_caught(gpu: Stub) -> None:
    put_back = (REAL, f"NAN = tl.constexpr({NAN})\n{REAL}")
    run(gpu, call_of(VIT, 20, 30), Changed(put_back))  # one that no kernel reads does no harm
    with pytest.raises(RuntimeError, match="Global variable NAN has changed"):
        run(gpu, call_of(VIT, 20, 30), Changed((f"(invalid, {NAN}", "(invalid, NAN"), put_back))
