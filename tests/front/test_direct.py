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


# ---- backward --------------------------------------------------------------------------------------------------------


def codes_of_training(run: Callable[..., Any], *inputs: Tensor) -> str:
    with fresh_cache():
        return "\n".join(run_and_get_code(lambda: run(*inputs).square().sum().backward())[1])


def test_a_backward_is_called_directly_too() -> None:
    run, bias = compiled(biased), torch.randn(5, 9, requires_grad=True)
    code = codes_of_training(run, *tensors(grad=True), bias)
    assert "kvt_attention_backward_buf" in code
    assert "torch.ops.kvt.attention_backward.default(" not in code
    for seed in range(4):
        found, expected = ([*tensors(seed, grad=True), bias.detach().clone().requires_grad_()] for _ in range(2))
        run(*found).square().sum().backward()
        q, k, v, b = expected
        out = torch.ops.kvt.attention(q, k, v, [b * 2], "0.3*s + c0[i, j]", "p", 4, [], 0.0, None, "auto")[0] * 2
        out.square().sum().backward()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("wanted", ["q", "kv", "v", "qb"])
def test_only_the_gradients_that_are_wanted(wanted: str) -> None:
    run = compiled(biased)
    for seed in range(3):
        found, expected = (
            [
                x.requires_grad_(name in wanted)
                for name, x in zip("qkvb", [*tensors(seed), torch.ones(5, 9)], strict=True)
            ]
            for _ in range(2)
        )
        run(*found).square().sum().backward()
        q, k, v, b = expected
        out = torch.ops.kvt.attention(q, k, v, [b * 2], "0.3*s + c0[i, j]", "p", 4, [], 0.0, None, "auto")[0] * 2
        out.square().sum().backward()
        for x, y in zip(found, expected, strict=True):
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None:
                torch.testing.assert_close(x.grad, y.grad)


def test_gradients_laid_out_otherwise_are_read_as_they_are() -> None:
    """The gradient of the output comes as autograd has it: expanded, transposed, and once more as it was."""
    q, k, v = tensors(grad=True)
    factors = [torch.ones(()).expand(2, 3, 5, 8), torch.randn(3, 2, 8, 5).permute(1, 0, 3, 2), torch.randn(2, 3, 5, 8)]
    for factor in [*factors, *factors]:
        found, expected = (
            torch.autograd.grad(
                torch.ops.kvt.attention(q, k, v, [], "0.3*s", "p", 4, [], 0.0, None, x)[0], (q, k, v), factor
            )
            for x in ("c", "aten")
        )
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert sum(isinstance(key, tuple) and key[0] == "backward" for key in ready._runners) >= 3


def test_a_mode_sees_a_backward() -> None:
    q, k, v = tensors()
    out, logsumexp, threshold = torch.ops.kvt.attention(q, k, v, [], "s", "p", 4, [], 0.0, None, "c")
    site = direct.BackwardSite()
    rest = (out, q, k, v, [], out, logsumexp, threshold, "s", "p", 4, [], 0.0, None, [True, False, True], "c")
    first = [site(*rest) for _ in range(3)][-1]
    with Watch() as watch:
        again = site(*rest)
    assert watch.seen == ["kvt.attention_backward.default"]
    assert [x.shape for x in first[:3]] == [q.shape, (0,), v.shape]
    for x, y in zip(first[:3], again[:3], strict=True):
        assert torch.equal(x, y)


def test_the_profiler_sees_both() -> None:
    run, inputs = compiled(), tensors(grad=True)
    for _ in range(3):
        run(*inputs).sum().backward()
    with torch.profiler.profile() as profile:
        run(*inputs).sum().backward()
    assert {"kvt::attention", "kvt::attention_backward"} <= {x.name for x in profile.events()}
