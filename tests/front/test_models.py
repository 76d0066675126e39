"""k = N equals dense, in outputs and every gradient, for the models the library promises to handle.

The budget is derived: how far the dense model itself is from its own float64 run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import MODELS, Model
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes

FACTOR = 8.0
"""Another order of sums may be this many times as far from float64 as the dense model is."""
FLOOR = 4 * torch.finfo(torch.float32).eps


def floats(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def run(call: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of all parameters) of a random projection of the outputs."""
    for parameter in model.parameters():
        parameter.grad = None
    outputs = floats(call(*args, **kwargs))
    if any(x.requires_grad for x in outputs):
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
        torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True) if x.requires_grad]).sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [x.detach() for x in outputs], gradients


def passes(results: list[PassResult], policy: Policy, lowering: str = "aten") -> Callable[..., Any]:
    """A Dynamo backend that is the passes alone: what Inductor would be given, run as it is."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        results.append(run_passes(gm, policy, lowering=lowering))
        return gm.forward

    return backend


def in_double(x: Any) -> Any:
    return pytree.tree_map(lambda y: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y, x)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each group of tensors."""
    scale = max((float(x.abs().max()) for x in expected if x.numel()), default=0.0) or 1.0
    pairs = zip(found, expected, strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0) / scale


FORCED = Policy(topk=1.0, force_rewrite=True)


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def train(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.mark.parametrize("spec", MODELS, ids=str)
def test_all_keys_equal_dense(spec: Model, train: bool) -> None:
    model, args, kwargs = spec(train)
    exact_model, rewritten_model = copy.deepcopy(model).double(), copy.deepcopy(model)
    dense = run(model, model, args, kwargs)
    expected = run(exact_model, exact_model, in_double(args), in_double(kwargs))
    results: list[PassResult] = []
    compiled = torch.compile(rewritten_model, backend=passes(results, FORCED))
    rewritten = run(compiled, rewritten_model, args, kwargs)

    sites = [d.site for r in results for d in r.decisions]
    assert len(sites) == spec.sites
    assert sum(site.tier == "fused" for site in sites) == spec.fused
    assert all(d.topk is not None for r in results for d in r.decisions)
    for kind, mine, theirs, exact in zip(("outputs", "gradients"), rewritten, dense, expected, strict=True):
        budget = FACTOR * max(error(theirs, exact), FLOOR)
        assert error(mine, exact) <= budget, f"{kind} are off by more than the dense model's own rounding allows"


@pytest.mark.parametrize("spec", MODELS, ids=str)
def test_all_keys_equal_dense_under_bfloat16_autocast(spec: Model, train: bool) -> None:
    model, args, kwargs = spec(train)
    exact = run(model, model, args, kwargs)
    results: list[PassResult] = []
    rewritten_model = copy.deepcopy(model)
    compiled = torch.compile(rewritten_model, backend=passes(results, FORCED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = run(model, model, args, kwargs)
        rewritten = run(compiled, rewritten_model, args, kwargs)
    assert sum(d.topk is not None for r in results for d in r.decisions) == spec.sites
    for mine, theirs, true in zip(rewritten, dense, exact, strict=True):
        # the same computation with fewer roundings: no further from float32 than eager autocast is
        assert error(mine, true) <= 2 * max(error(theirs, true), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("spec", MODELS, ids=str)
def test_fewer_keys_equal_the_reference_at_every_site(spec: Model) -> None:
    model, args, kwargs = spec(False)
    outputs = []
    with torch.no_grad():
        dense = floats(model(*args, **kwargs))
        for lowering in ("aten", "reference"):
            results: list[PassResult] = []
            torch.compiler.reset()
            compiled = torch.compile(model, backend=passes(results, Policy(topk=3), lowering))
            outputs.append(floats(compiled(*args, **kwargs)))
            assert sum(d.topk == 3 for r in results for d in r.decisions) == spec.sites
    assert error(outputs[0], outputs[1]) <= 1e3 * FLOOR, "the lowerings keep different keys"
    assert error(outputs[0], dense) > 1e4 * FLOOR, "nothing was left out"
