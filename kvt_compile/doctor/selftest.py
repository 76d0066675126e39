"""A lowering's name and a device -> how far it is from the reference on one small attention, forward and backward.

    error(lowering) <= FACTOR * error(plain float32)         both against the reference in float64

The same measure as the test suite's: a lowering may be a few times as far from float64 as the plain dense computation
in float32 is, for another order of sums.  The kept keys must be the same, none more and none fewer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.plain.reference import reference_attention, reference_softmax

FACTOR = 8.0
TOPK = 7
SCORE = "where(le(j, i + 12), 0.25*s + c0[h, i, j], -oo)"
"""A scale, a learned bias and a mask: what most models have."""


@dataclass(frozen=True)
class SelfTest:
    """error and budget are relative to the largest value of each tensor; the worst of them all is given."""

    passed: bool
    error: float
    budget: float
    said: str = ""
    """What went wrong, in one sentence."""


def specs() -> tuple[KernelSpec, SoftmaxSpec]:
    """What the self-test runs."""
    q, k, v, bias = tensors(torch.float32, "cpu")
    return KernelSpec.of(q, k, v, (bias,), SCORE), SoftmaxSpec("float32", "float32")


def tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    """q [2, 4, 33, 16], k and v [2, 2, 41, 16], bias [4, 33, 41], always the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 33, 16), (2, 2, 41, 16), (2, 2, 41, 16), (4, 33, 41))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def self_test(lowering: str, device: str) -> SelfTest:
    """Runs `lowering` on `device` ("cpu", "cuda").  Never raises: what goes wrong is in the result."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built = all(map(_builder(lowering), specs()))
            actual = _by_op(lowering, device)
        if not built:  # something else ran in its place
            why = [str(x.message).strip().replace("\n", " ") for x in caught if "ATen" in str(x.message)]
            return SelfTest(False, float("nan"), float("nan"), why[0] if why else "its kernel could not be built")
        exact, plain = _by_reference(torch.float64), _by_reference(torch.float32)
        if not torch.equal(actual[0] != 0, exact[0] != 0):
            return SelfTest(False, float("nan"), float("nan"), "it keeps other keys than the reference")
        pairs = [
            (_distance(a, e), FACTOR * _distance(p, e) + torch.finfo(torch.float32).eps)
            for a, p, e in zip(actual, plain, exact, strict=True)
        ]
        error, budget = max(pairs, key=lambda pair: pair[0] / pair[1])
        said = "" if error <= budget else f"its error {error:.1e} is above the budget of {budget:.1e}"
        return SelfTest(error <= budget, error, budget, said)
    except Exception as failure:  # a doctor that dies of a patient's illness helps nobody
        first = str(failure).strip().splitlines()
        return SelfTest(False, float("nan"), float("nan"), f"{type(failure).__name__}: {first[0] if first else ''}")


def _builder(lowering: str) -> Callable[[object], bool]:
    """What says whether a spec's kernel can be built; a lowering that builds none has nothing that could fail."""
    built: Callable[[object], bool] = getattr(lowerings.get(lowering), "built", lambda spec: True)
    return built


def _by_op(lowering: str, device: str) -> list[Tensor]:
    """[weights of a softmax, out, dq, dk, dv, dbias], in float64 on the CPU."""
    q, k, v, bias = leaves = tensors(torch.float32, device)
    scores = bias.detach().clone()
    weights = torch.ops.kvt.topk_softmax(scores, -1, TOPK, torch.float32, lowering)
    out, _, _ = torch.ops.kvt.attention(q, k, v, [bias], SCORE, "p", TOPK, [], 0.0, None, lowering)
    return _with_gradients(weights, out, leaves)


def _by_reference(dtype: torch.dtype) -> list[Tensor]:
    q, k, v, bias = leaves = tensors(dtype, "cpu")
    weights = reference_softmax(bias.detach(), TOPK)[0]
    out = reference_attention(q, k, v, (bias,), topk=TOPK, score=SCORE, dtype=dtype).out
    return _with_gradients(weights, out, leaves)


def _with_gradients(weights: Tensor, out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    direction = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, list(leaves), direction)
    return [x.detach().cpu().double() for x in (weights, out, *gradients)]


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).abs().max() / exact.abs().max())
