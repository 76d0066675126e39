"""Two lists of tensors -> how far apart they are, and how far they may be: float64 is the judge.

The dense model's own float32 result is some way from its float64 result; a rewritten one may be FACTOR times as far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FACTOR = 8.0
"""Another order of sums, through a network of dozens of layers."""
FLOAT64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
LOOSE = 1e-3
"""A budget that says nothing any more."""
Check = dict[str, float]
"""error and budget, both relative to the largest value of the tensor that comes closest to its budget; and bits, 64
where only float64 could say: float32 rounding had sent the model another way"""


def run(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor among the outputs.  What a model draws at random is the same each time."""
    torch.manual_seed(1)
    return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]


def doubled(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """The same model and inputs in float64."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return copy.deepcopy(model).double(), pytree.tree_map(wide, args), pytree.tree_map(wide, kwargs)


def quiet(model: nn.Module) -> nn.Module:
    """Switches off everything random in a model's training mode: every number called drop-something, in a module or
    its configuration, becomes 0."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                    setattr(holder, name, 0.0)
    return model


def gradients(
    model: nn.Module, args: Any, kwargs: Any, compiled: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Name -> gradient of every parameter that has one, of a fixed random functional of the outputs (those of
    `compiled`, which runs on the model's parameters, where it is given)."""
    outputs = run(model if compiled is None else compiled, args, kwargs)
    generator = torch.Generator().manual_seed(2)
    used = [x for x in outputs if x.requires_grad]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) / x.numel() for x in used]
    torch.autograd.backward(used, weights)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(actual: Sequence[Tensor], dense: Sequence[Tensor], exact: Sequence[Tensor], *, unit: float = 1.0) -> Check:
    """How far `actual` is from `exact`, beside how far it may be given how far `dense` is.

    `unit`: the rounding of `actual` in units of that of `dense`; FLOAT64 where it was computed in float64.
    """
    if not len(actual) == len(dense) == len(exact):
        return {"error": float("inf"), "budget": 0.0}
    worst: Check = {"error": 0.0, "budget": 0.0}
    errors = [apart(d, e) for d, e in zip(dense, exact, strict=True)]
    largest_error, largest = max(errors, default=0.0), max(map(size, exact), default=0.0)
    for a, d, e, rounding in zip(actual, dense, exact, errors, strict=True):
        scale = size(e)
        if scale <= rounding:  # zero in truth (the gradient of a bias that a softmax or a norm cancels): all rounding
            scale, rounding = largest, largest_error
        budget = unit * (FACTOR * rounding + torch.finfo(d.dtype).eps * scale)
        check = {"error": apart(a, e) / (scale or 1.0), "budget": budget / (scale or 1.0)}
        if not _nearness(check) <= _nearness(worst):
            worst = check
    return worst


def settled(check: Check) -> bool:
    """Whether float32 has said what there is to say.

    Where a model chooses (the best queries, an expert, one side of a ReLU whose gradient jumps) rounding may choose
    otherwise, in the dense model as well as in the rewritten one; then float64 has to tell it from a wrong rewrite.
    """
    return check["error"] <= check["budget"] <= LOOSE


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max((apart(a, e) / (size(e) or 1.0) for a, e in zip(actual, expected, strict=True)), default=0.0)


def size(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where shapes differ, or what is infinite or NaN is not so in both."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    usual = a.isfinite() & b.isfinite()
    if not torch.equal(a[~usual].nan_to_num(7.0), b[~usual].nan_to_num(7.0)):
        return float("inf")
    return float((a - b)[usual].abs().max()) if usual.any() else 0.0


def _nearness(check: Check) -> float:
    return check["error"] / check["budget"] if check["budget"] else float(check["error"] > 0) * float("inf")
