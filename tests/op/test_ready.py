"""A call laid out like one before takes a short way: the same result, and every check that could fail anew is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvt_compile import topk_attention
from kvt_compile.kernels.op import lowerings, ops, ready
from kvt_compile.kernels.plain.aten import AtenLowering


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    ready.forget()


def tensors(seed: int = 0, keys: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(1, 2, n, 8).to(dtype) for n in (5, keys, keys)]


def call(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor] = (), **other: object) -> tuple[Tensor, ...]:
    score = "s + c0[h, j]" if captured else "s"
    rest = {"topk": 3, "sizes": [], "dropout_p": 0.0, "seed": None, "lowering": "c"} | other
    return torch.ops.kvt.attention(q, k, v, list(captured), score, "p", **rest)  # type: ignore[no-any-return]


def same(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("captured", [False, True])
def test_the_second_call_is_the_first_with_other_numbers(captured: bool) -> None:
    bias = [torch.randn(2, 9)] if captured else []
    call(*tensors(0), bias)
    assert len(ready._runners) == 1
    short = call(*tensors(1), bias)
    ready.forget()
    assert same(short, call(*tensors(1), bias))


def test_what_changes_a_result_is_part_of_the_key() -> None:
    q, k, v = tensors()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    first = call(q, k, v)
    assert same(call(*turned), first)
    assert not same(call(q, k, v, topk=4), first)
    assert len(call(*tensors(keys=10))) == 3
    assert call(*tensors(dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert same(call(q, k, v, [torch.zeros(2, 9)]), call(q, k, v, [torch.zeros(4, 18)[::2, ::2]]))
    assert len(ready._runners) == 7


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda q, k, v: call(q, k, v[:, :, 1:]), "number of keys"),
        (lambda q, k, v: call(q, k.double(), v), "dtype differs"),
        (lambda q, k, v: call(q, k, v, topk=0), "topk is 0"),
        (lambda q, k, v: call(q, k, v, tolerance=2.0), "tolerance is 2"),
        (lambda q, k, v: call(q, k, v, [torch.zeros(2, 5)]), "size 5"),
        (lambda q, k, v: call(q.to_sparse(), k, v), "sparse"),
    ],
)
def test_what_is_wrong_is_told_after_a_call_that_was_right(fault: object, message: str) -> None:
    q, k, v = tensors()
    call(q, k, v)
    call(q, k, v, [torch.zeros(2, 9)])
    with pytest.raises((ValueError, RuntimeError), match=message):
        fault(q, k, v)  # type: ignore[operator]


@pytest.mark.parametrize("lowering", ["c", "aten"])
def test_a_captured_tensor_that_is_minus_another_is_not_taken_for_it(lowering: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    bias = torch.randn(2, 9)
    lazy = torch._neg_view(bias)
    assert lazy.is_neg()
    for _ in range(2):
        ours, theirs = call(q, k, v, [lazy], lowering=lowering), call(q, k, v, [-bias], lowering=lowering)
        assert same(ours, theirs)
        assert same(*(torch.autograd.grad(x[0].sum(), (q, k, v)) for x in (ours, theirs)))


def test_memory_that_was_freed_is_noticed() -> None:
    q, k, v = tensors()
    call(q, k, v)
    q.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"no memory|storage"):
        call(q, k, v)


def test_another_lowering_of_the_name_is_asked() -> None:
    class Zeros(AtenLowering):
        def forward(self, call: object) -> tuple[Tensor, Tensor, Tensor]:
            return tuple(torch.zeros_like(x) for x in super().forward(call))  # type: ignore[arg-type, return-value]

    q, k, v = tensors()
    first = call(q, k, v)
    undo = lowerings.register("c", Zeros())
    try:
        assert call(q, k, v)[0].count_nonzero() == 0
    finally:
        undo()
    assert same(call(q, k, v), first)


def test_gradients_and_dropout_go_the_long_way_where_they_must() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = call(q, k, v)[0]
    again = call(q, k, v)[0]
    assert again.requires_grad
    assert torch.equal(*(torch.autograd.grad(x.sum(), q)[0] for x in (out, again)))
    known = len(ready._runners)
    call(q, k, v, dropout_p=0.5, seed=torch.tensor([1]))
    assert len(ready._runners) == known


class Seen(TorchDispatchMode):
    """Which operators it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_what_has_to_see_a_call_sees_those_that_were_checked_before() -> None:
    q, k, v = tensors()
    first = call(q, k, v)
    with Seen() as seen:
        assert same(call(q, k, v), first)
    assert seen.names[0] == "kvt::attention"
    assert isinstance(call(*(TwoTensor(x, x) for x in (q, k, v)))[0], TwoTensor)
    with FakeTensorMode() as mode:
        assert isinstance(call(*(mode.from_tensor(x) for x in (q, k, v)))[0], FakeTensor)
    assert same(torch.func.vmap(call)(*(x[None] for x in (q, k, v))), [x[None] for x in first])
    gradient = torch.func.grad(lambda q: call(q, k, v)[0].sum())(q)
    assert torch.equal(gradient, torch.autograd.grad(call(q.requires_grad_(), k, v)[0].sum(), q)[0])


def test_a_remembered_call_does_not_reach_autograd_unless_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    bias = torch.randn(2, 9)
    first = call(q, k, v, [bias])
    monkeypatch.setattr(ops, "check_attention", None)  # what every call passes that goes further
    assert same(call(q, k, v, [bias]), first)
    bias.requires_grad_()
    assert call(q, k, v, [bias])[0].grad_fn is not None  # by the short way behind autograd
    with torch.no_grad():
        assert call(q, k, v, [bias])[0].grad_fn is None
    with torch.inference_mode():
        assert same(call(*tensors(), [bias]), first)


def test_attention_inside_of_a_region_is_still_asked_for_its_lowering() -> None:
    q, k, v = tensors()
    call(q, k, v)
    lowerings.enter(lowerings.Inside("aten"))
    try:
        with pytest.raises(lowerings.LoweringError, match="inside of 'aten'"):
            call(q, k, v)
    finally:
        lowerings.leave()


def test_undoing_a_registration_leaves_those_that_came_after() -> None:
    aten = lowerings.get("aten")
    undo = lowerings.register("c", aten)
    also = lowerings.register("came later", aten)
    undo()
    assert lowerings.get("came later") is aten
    assert lowerings.get("c") is not aten
    assert lowerings.names() == ("auto", "triton", "c", "aten", "reference", "came later")
    also()
    with pytest.raises(lowerings.LoweringError, match="unknown lowering 'came later'"):
        lowerings.get("came later")


# ---- before the dispatcher ------------------------------------------------------------------------------------------


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `topk_attention` was answered at once."""
    taken: list[bool] = []
    real = ready.at_once

    def noted(*args: Any) -> Any:
        found = real(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(ready, "at_once", noted)
    return taken


def test_a_plain_call_is_answered_at_once(ways: list[bool]) -> None:
    q, k, v = tensors()
    bias = torch.randn(5, 9)
    first = [topk_attention(q, k, v, topk=3, attn_mask=mask) for mask in (None, bias)]
    again = [topk_attention(q, k, v, topk=3, attn_mask=mask) for mask in (None, bias)]
    assert same(first, again)
    assert torch.equal(topk_attention(*map(nn.Parameter, (q, k, v)), topk=3).detach(), first[0])
    with torch.no_grad():
        assert torch.equal(topk_attention(*map(nn.Parameter, (q, k, v)), topk=3), first[0])
    with torch.inference_mode():
        assert torch.equal(topk_attention(q, k.clone(), v, topk=3), first[0])
    assert ways == [False, False, True, True, False, True, True]


class Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Nothing but a name."""


def test_whatever_has_to_see_the_operator_does(ways: list[bool]) -> None:
    q, k, v = tensors()

    def run(*x: Tensor) -> Tensor:
        return topk_attention(*x, topk=3)

    first = run(q, k, v)
    with Seen() as seen:
        run(q, k, v)
    assert seen.names[0] == "kvt::attention"
    with Function() as function:
        run(q, k, v)
    assert any("kvt" in x for x in function.seen)
    with torch.profiler.profile() as profile:
        run(q, k, v)
    assert any(x.name == "kvt::attention" for x in profile.events())
    assert torch.equal(torch.func.vmap(run)(*(x[None] for x in (q, k, v)))[0], first)
    assert torch.func.grad(lambda q: run(q, k, v).sum())(q).any()
    assert type(run(*(x.as_subclass(Subclass) for x in (q, k, v)))) is Subclass
    with FakeTensorMode() as mode:
        assert isinstance(run(*(mode.from_tensor(x) for x in (q, k, v))), FakeTensor)
    with FakeTensorMode(), pytest.raises(AssertionError, match="fake"):
        run(q, k, v)
    assert torch.equal(torch.jit.trace(run, (q, k, v), check_trace=False)(q, k, v), first)
    assert run(q.clone().requires_grad_(), k, v).requires_grad
    with torch.autocast("cpu"):
        assert run(q, k, v).dtype == torch.bfloat16
    assert not any(ways)
    assert torch.equal(run(q, k, v), first)
    assert ways.pop()


@pytest.mark.parametrize("calls", [0, 2])
def test_a_tangent_is_not_lost(calls: int) -> None:
    q, k, v = tensors()
    functions = (
        lambda x: topk_attention(x, k, v, topk=3),
        lambda x: topk_attention(q, k, v, topk=3, attn_mask=x[0, 0, :, :1].expand(5, 9)),
        lambda x: call(x, k, v)[0],
        lambda x: torch.ops.kvt.topk_softmax(x, -1, 2, torch.float32, "auto"),
    )
    for function in functions:
        for _ in range(calls):
            function(q)
        with forward_ad.dual_level():
            function(q)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                function(forward_ad.make_dual(q, torch.ones_like(q)))
