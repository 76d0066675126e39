"""A lowering that runs another and the reference on the same inputs -> how far apart they are, forward and backward.

With both on the same inputs, what rounding did further up cannot move a key across the threshold here: whatever differs
is this site's doing.  The budget is that of the plain computation in float32: FACTOR times as far from float64.  A sum
that cancels (values of -1e4 for every key leave no gradient of q and k) is off by what rounding makes of its terms, and
the plain computation may be right by chance: a gradient over that budget is held to what it is off by where the
tensors and the gradient of the output are rounded otherwise (q and k only where every key is kept).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.plain.reference import reference_attention, reference_softmax
from kvt_compile.verification.compare import FLOAT64, NOTHING, compare_tensors, worst
from kvt_compile.verification.facts import Difference

NAME = "beside the reference"
ROUNDINGS = 64
"""Roundings a sum over the keys of one row may have."""
LANES = 8
"""Parts that the sum over the features of a score is added up in, at least: each rounds once for each of its terms."""
Rounded = Callable[[Tensor], Tensor]


class Beside:
    """Keeps the worst difference and returns the other lowering's results."""

    name = NAME
    devices: tuple[str, ...] = ()

    def __init__(self, other: str = "auto") -> None:
        self.other = other
        self.calls = 0
        self.worst: Difference = NOTHING

    def supports(self, spec: KernelSpec | SoftmaxSpec) -> str | None:
        return None

    def source(self, spec: KernelSpec | SoftmaxSpec) -> None:
        return None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        results = self._chosen(call.spec, call.q).forward(call)
        tensors = [call.q, call.k, call.v, *call.captured]
        self._note({"output": results[0]}, lambda dtype: {"output": _attention(call, tensors, dtype)}, call.spec)
        return results

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, logsumexp: Tensor, threshold: Tensor
    ) -> Gradients:
        found = self._chosen(call.spec, call.q).backward(call, grad_out, out, logsumexp, threshold)
        inputs = [call.q, call.k, call.v, *call.captured]
        names = ["q", "k", "v", *(f"captured tensor {n}" for n in range(len(call.captured)))]
        wanted = [n for n, need in enumerate(call.spec.needs_grad) if need]

        def gradients(dtype: torch.dtype, rounded: Rounded = _as_it_is) -> dict[str, Tensor]:
            first = 0 if call.topk >= call.keys else 2  # other scores may keep other keys
            given = [rounded(x.to(dtype)) if first <= n < 3 else x for n, x in enumerate(inputs)]

            def run(*leaves: Tensor) -> Tensor:
                full = list(given)
                for n, leaf in zip(wanted, leaves, strict=True):
                    full[n] = leaf
                return _attention(call, full, dtype)

            # torch.func, because ordinary autograd is off inside an operator's implementation
            pull: Callable[[Tensor], tuple[Tensor, ...]]
            _, pull = torch.func.vjp(run, *(given[n].to(dtype) for n in wanted))  # type: ignore[misc]
            found = pull(rounded(grad_out.to(dtype)))
            return {f"gradient of {names[n]}": x for n, x in zip(wanted, found, strict=True)}

        given = dict(zip((f"gradient of {name}" for name in names), (*found[:3], *found[3]), strict=True))
        present = {name: x for name, x in given.items() if x is not None}
        self._note(present, gradients, call.spec, lambda: gradients(torch.float64, _rounded_otherwise))
        return found

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, *more: Any) -> Tensor:
        weights = self._chosen(SoftmaxSpec.of(scores.dtype, dtype), scores).softmax(scores, dim, topk, dtype, *more)

        def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
            rows = scores.to(dtype).reshape(1) if scores.dim() == 0 else scores.to(dtype).movedim(dim, -1)
            return {"weights": reference_softmax(rows, topk)[0].movedim(-1, dim).reshape(scores.shape)}

        self._note({"weights": weights}, by_reference)
        return weights

    def softmax_backward(self, grad: Tensor, weights: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        chosen = self._chosen(SoftmaxSpec.of(input_dtype, weights.dtype), grad)
        found = chosen.softmax_backward(grad, weights, dim, input_dtype)

        def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
            w, g = weights.to(dtype), grad.to(dtype)
            w, g = (x.reshape(1) if x.dim() == 0 else x for x in (w, g))
            return {"gradient of scores": (w * (g - (w * g).sum(dim, keepdim=True))).reshape(weights.shape)}

        self._note({"gradient of scores": found}, by_reference)
        return found

    def _chosen(self, spec: KernelSpec | SoftmaxSpec, x: Tensor) -> lowerings.Lowering:
        return lowerings.choose(self.other, spec, x.device.type)

    def _note(
        self,
        found: dict[str, Tensor],
        by_reference: Callable[[torch.dtype], dict[str, Tensor]],
        spec: KernelSpec | None = None,
        otherwise: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        self.calls += 1
        exact, small = by_reference(torch.float64), by_reference(torch.float32)
        checks = {name: _check(name, x, small[name], exact[name], spec) for name, x in found.items()}
        if otherwise is not None and not all(x.ok for x in checks.values()):
            shaken = otherwise()
            looser = (_check(name, x, shaken[name], exact[name], spec) for name, x in found.items())
            checks = {x.name: max(x, checks[x.name], key=lambda check: check.budget) for x in looser}
        rows = [replace(check, name=f"{name} of the attention itself") for name, check in checks.items()]
        self.worst = worst([self.worst, *rows])


def _check(name: str, found: Tensor, plain: Tensor, exact: Tensor, spec: KernelSpec | None) -> Difference:
    wide = found.dtype == torch.float64
    # nothing is cast on the way, so float64 is held to what float32 is off by on these inputs: with scores near 5e6
    # (HaloNet with random weights) that is 2e-3, and 1e-12 in float64
    beside = plain if wide else plain.to(found.dtype)
    (check,) = compare_tensors([(name, found, beside, exact)], FLOAT64 if wide else 1.0, least=0.0)
    # sums are float32 where the tensors are shorter
    most = max(ROUNDINGS, spec.head_dim // LANES if spec else 0)
    roundings = most * torch.finfo(found.dtype if wide else torch.float32).eps
    return replace(check, budget=max(check.budget, roundings))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _rounded_otherwise(x: Tensor) -> Tensor:
    """Every number one rounding of float32 larger or smaller, the same ones each time."""
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    return x * (1 + torch.finfo(torch.float32).eps * signs)


def _attention(call: AttentionCall, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    q, k, v, *captured = tensors
    return reference_attention(
        q, k, v, captured, topk=call.topk, score=call.spec.score, weight=call.spec.weight, sizes=call.sizes,
        dropout_p=call.dropout_p, seed=call.seed, dtype=dtype,
    ).out  # fmt: skip


@contextmanager
def beside_the_reference(other: str = "auto") -> Iterator[Beside]:
    """The lowering under its name, for as long as the block lasts."""
    lowering = Beside(other)
    undo = lowerings.register(NAME, lowering)
    try:
        yield lowering
    finally:
        undo()
