"""Launch every kernel of a call on the stub driver, and count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from stub_gpu import Stub

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import SoftmaxSpec
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.targets import parts_of


def run(gpu: Stub, call: AttentionCall, launcher: Launcher) -> None:
    """Launch the forward, or, where the spec says what needs a gradient, the backward."""
    before = gpu.launches
    if not call.spec.needs_grad:
        launcher.forward(call)
    else:
        out = call.q.new_zeros((*call.rows, call.v.shape[3]), dtype=call.v.dtype)
        rows = call.q.new_zeros(call.rows, dtype=call.spec.accumulate)
        launcher.backward(call, torch.zeros_like(out), out, rows, rows)
    assert gpu.launches - before == len(parts_of(call.spec))


def softmax(gpu: Stub, spec: SoftmaxSpec, shape: Sequence[int]) -> None:
    """Launch both row kernels, over the last dimension."""
    dtypes = getattr(torch, spec.dtype), getattr(torch, spec.out_dtype)
    lowering, before, last = gpu.lowering(), gpu.launches, len(shape) - 1
    weights = lowering.softmax(torch.zeros(shape, dtype=dtypes[0]), last, 5, dtypes[1])
    lowering.softmax_backward(torch.zeros_like(weights), weights, last, dtypes[0])
    assert gpu.launches - before == 2
