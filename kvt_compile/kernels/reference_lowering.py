"""kvt:: ops -> the reference: `lowering="reference"` runs the contract itself, in float64, dense.  For debugging: if a
model is right with it and wrong with another lowering, the other lowering is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvt_compile.kernels.lowerings import Gradients
from kvt_compile.kernels.reference import reference_attention, reference_softmax
from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec


class ReferenceLowering:
    """Any device, every spec, O(Nq * Nk) memory."""

    name = "reference"
    devices: tuple[str, ...] = ()

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None

    def forward(
        self,
        spec: KernelSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        topk: int,
        sizes: Sequence[int],
        dropout_p: float,
        seed: Tensor | None,
        tolerance: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = reference_attention(
            q, k, v, captured, topk=topk, score=spec.score, weight=spec.weight,
            sizes=sizes, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        rows = result.logsumexp.to(spec.accumulate), result.threshold.to(spec.accumulate)
        return result.out.to(v.dtype).contiguous(), rows[0].contiguous(), rows[1].contiguous()

    def backward(
        self,
        spec: KernelSpec,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        out: Tensor,
        logsumexp: Tensor,
        threshold: Tensor,
        topk: int,
        sizes: Sequence[int],
        dropout_p: float,
        seed: Tensor | None,
    ) -> Gradients:
        inputs = [q, k, v, *captured]
        wanted = [n for n, need in enumerate(spec.needs_grad) if need]

        if not wanted:
            return None, None, None, [None] * len(captured)

        def run(*leaves: Tensor) -> Tensor:
            full = list(inputs)
            for n, leaf in zip(wanted, leaves, strict=True):
                full[n] = leaf
            return reference_attention(
                full[0], full[1], full[2], full[3:], topk=topk, score=spec.score, weight=spec.weight,
                sizes=sizes, dropout_p=dropout_p, seed=seed,
            ).out  # fmt: skip

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
        return weights.movedim(-1, dim).to(dtype).contiguous().view(scores.shape)

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        w, g = (x.double().reshape(1) if x.dim() == 0 else x.double() for x in (weights, grad))
        return (w * (g - (w * g).sum(dim, keepdim=True))).to(input_dtype).contiguous().view(weights.shape)

    def source(self, spec: KernelSpec | SoftmaxSpec) -> None:
        return None


LOWERING = ReferenceLowering()
