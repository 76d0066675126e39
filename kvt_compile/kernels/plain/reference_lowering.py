"""kvt:: ops -> the reference: `lowering="reference"` runs the contract itself, in float64, dense.  For debugging: if a
model is right with it and wrong with another lowering, the other lowering is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.captured import check_call
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.plain.reference import Reference, reference_attention, reference_softmax


class ReferenceLowering:
    """Any device, every spec, O(Nq * Nk) memory."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        result = _run(call, [call.q, call.k, call.v, *call.captured])
        logsumexp, threshold = (x.to(call.spec.accumulate).contiguous() for x in (result.logsumexp, result.threshold))
        return result.out.to(call.v.dtype).contiguous(), logsumexp, threshold

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        inputs = [call.q, call.k, call.v, *call.captured]
        wanted = [n for n, need in enumerate(call.spec.needs_grad) if need]
        if not wanted:
            return None, None, None, [None] * len(call.captured)

        def run(*leaves: Tensor) -> Tensor:
            full = list(inputs)
            for n, leaf in zip(wanted, leaves, strict=True):
                full[n] = leaf
            return _run(call, full).out

        # torch.func, because ordinary autograd is off inside an operator's implementation
        pull: Callable[[Tensor], tuple[Tensor, ...]]
        _, pull = torch.func.vjp(run, *(inputs[n].double() for n in wanted))  # type: ignore[misc]
        gradients: list[Tensor | None] = [None] * len(inputs)
        for n, gradient in zip(wanted, pull(grad_out.double()), strict=True):
            gradients[n] = gradient.to(inputs[n].dtype).contiguous()
        return gradients[0], gradients[1], gradients[2], gradients[3:]

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        rows = scores.double().reshape(1) if scores.dim() == 0 else scores.double().movedim(dim, -1)
        weights = reference_softmax(rows, topk)[0]
        out = torch.empty(scores.shape, dtype=dtype, device=scores.device)  # no view: a model may write to it
        return out.copy_(weights.movedim(-1, dim).reshape(scores.shape))

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        w, g = (x.double().reshape(1) if x.dim() == 0 else x.double() for x in (weights, grad))
        return (w * (g - (w * g).sum(dim, keepdim=True))).to(input_dtype).contiguous().view(weights.shape)

    def source(self, spec: KernelSpec | SoftmaxSpec) -> None:
        return None


def _run(call: AttentionCall, tensors: Sequence[Tensor]) -> Reference:
    """The reference on q, k, v, *captured."""
    check_call(call)
    q, k, v, *captured = tensors
    return reference_attention(
        q, k, v, captured, topk=call.topk, score=call.spec.score, weight=call.spec.weight,
        sizes=call.sizes, dropout_p=call.dropout_p, seed=call.seed, draw=call.draw,
        selection=call.selection,
    )  # fmt: skip


LOWERING = ReferenceLowering()
