"""The passes see nothing of the process they run in, and leave nothing behind in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from nets import Block, Net, assert_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kvt_compile

FORCED = {"topk": 1.0, "force_rewrite": True}


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = call(x)
    out.square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint_reentrant", "hooks", "save_on_cpu"])
def test_first_call_under_saved_tensor_hooks(how: str) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 10, 32)
    compiled = torch.compile(block, backend="kvt", options=FORCED)
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    def under(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if how.startswith("checkpoint"):
                return checkpoint(call, x, use_reentrant="reentrant" in how)  # type: ignore[no-any-return]
            hooks: Any = (
                torch.autograd.graph.save_on_cpu()
                if how == "save_on_cpu"
                else torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
            )
            with hooks:
                return call(x)

        return run

    assert_same(gradients(block, under(compiled), x), gradients(block, under(block), x))
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in saved)


class _Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fakes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self.fakes += any(isinstance(x, torch._subclasses.FakeTensor) for x in leaves)
        return func(*args, **(kwargs or {}))


class _Doubles(TorchFunctionMode):
    """Changes what every function returns: whoever lets it see a fake gets wrong shapes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.unsqueeze(0) if isinstance(out, torch._subclasses.FakeTensor) else out


@contextmanager
def _float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "default_dtype": _float64_by_default,
    "deterministic": _deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "function_mode": _Doubles,
}


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(), torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.get_dynamic_layer_stack_depth(), torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state().sum().item(),
    )  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("way", ["passes", "rewrite", "explain"])
def test_ambient_modes_change_nothing(around: str, way: str) -> None:
    from kvt_compile.capture.capture import capture
    from kvt_compile.passes.decide import Policy
    from kvt_compile.passes.pipeline import run_passes

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 10, 32)
    expected = net(x)
    graph = capture(net, (x,), {}).graph
    before = state()
    with ExitStack() as stack:
        stack.enter_context(AROUND[around]())
        if way == "passes":
            assert len(run_passes(graph, Policy(1.0, force_rewrite=True)).decisions) == 2
            module: nn.Module = graph
        elif way == "rewrite":
            module = kvt_compile.rewrite(net, x, **FORCED).module
        else:
            report = kvt_compile.explain(net, x, **FORCED)
            assert [site.module for site in report.sites] == ["first", "second"]
            module = net
    assert state() == before
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_a_dispatch_mode_of_the_user_sees_no_fake() -> None:
    net, x = Net(), torch.randn(2, 10, 32)
    with _Counts() as mode:
        kvt_compile.rewrite(net, x, **FORCED)
    assert mode.fakes == 0
