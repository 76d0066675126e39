"""Inductor's Python calls a site's kernel past the dispatcher: the same results, and whoever watches still sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from kvt_compile.kernels import direct
from kvt_compile.kernels.op import lowerings, ready
from kvt_compile.kernels.plain.aten import AtenLowering

OPERATOR = "torch.ops.kvt.attention.default("


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3 + bias * 2).softmax(-1) @ v * 2


def tensors(seed: int = 0, grad: bool = False, keys: int = 9) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 3, n, 8).requires_grad_(grad) for n in (5, keys, keys)]


def compiled(function: Callable[..., Any] = attention, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, backend="kvt", options={"topk": 4}, **options)


def by_operator(q: Tensor, k: Tensor, v: Tensor, lowering: str = "auto") -> Tensor:
    return torch.ops.kvt.attention(q, k, v, [], "0.3*s", "p", 4, [], 0.0, None, lowering)[0]  # type: ignore[no-any-return]


def code_of(run: Callable[..., Any], *args: Any) -> str:
    with fresh_cache():
        return str(run_and_get_code(run, *args)[1][0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_call_is_the_operators(mode: Any) -> None:
    with mode():
        run = compiled()
        code = code_of(run, *tensors())
        assert "kvt_attention_buf0(" in code
        assert OPERATOR not in code
        found = [run(*tensors(seed)) for seed in range(4)]
        for seed, out in enumerate(found):
            assert torch.equal(out, by_operator(*tensors(seed)))


def test_what_is_captured_and_computed_around_goes_with_it() -> None:
    bias = torch.randn(5, 9)
    run = compiled(biased)
    assert "kvt_attention_" in code_of(run, *tensors(), bias)
    for seed in range(3):
        q, k, v = tensors(seed)
        out = torch.ops.kvt.attention(q, k, v, [bias * 2], "0.3*s + c0[i, j]", "p", 4, [], 0.0, None, "auto")[0] * 2
        torch.testing.assert_close(run(q, k, v, bias), out)


def test_training_has_the_operators_gradients() -> None:
    run = compiled()
    for seed in range(3):
        ours, expected = tensors(seed, grad=True), tensors(seed, grad=True)
        run(*ours).square().sum().backward()
        by_operator(*expected).square().sum().backward()
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


def test_sizes_that_are_known_at_run_time_alone_go_through_the_operator() -> None:
    run = compiled(dynamic=True)
    assert OPERATOR in code_of(run, *tensors())
    for keys in (9, 11, 30):
        assert torch.equal(run(*tensors(keys=keys)), by_operator(*tensors(keys=keys)))


def branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, attention, lambda q, k, v: attention(q, k, v) * 2, (q, k, v))  # type: ignore[no-any-return]


def test_a_part_of_a_graph_goes_through_the_operator() -> None:
    with torch.no_grad():
        run = compiled(branches)
        assert OPERATOR in code_of(run, *tensors())
        for seed in range(4):
            q, k, v = tensors(seed)
            torch.testing.assert_close(run(q, k, v), by_operator(q, k, v) * (1 if q.sum() > 0 else 2))


def test_another_backend_writes_what_it_did() -> None:
    compiled()(*tensors())
    torch.compiler.reset()
    assert OPERATOR in code_of(torch.compile(by_operator), *tensors())


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


def test_a_mode_sees_the_operator() -> None:
    site, rest = direct.Site(), ([], "s", "p", 4, [], 0.0, None, "c")
    for _ in range(3):
        site(*tensors(), *rest)
    inputs = tensors(1)
    with Watch() as watch:
        out = site(*inputs, *rest)
    assert watch.seen == ["kvt.attention.default"]
    assert torch.equal(out[0], site(*inputs, *rest)[0])


class Counted(AtenLowering):
    name = "counted"
    calls = 0

    def forward(self, call: Any) -> Any:
        self.calls += 1
        return super().forward(call)


def test_a_lowering_of_another_making_takes_over() -> None:
    site, rest = direct.Site(), ([], "s", "p", 4, [], 0.0, None, "c")
    for _ in range(3):
        site(*tensors(), *rest)
    counted = Counted()
    undo = lowerings.register("c", counted)
    try:
        for _ in range(3):
            site(*tensors(), *rest)
        assert counted.calls == 3
    finally:
        undo()
    site(*tensors(), *rest)
    assert counted.calls == 3
    assert len(ready._runners) == 1
