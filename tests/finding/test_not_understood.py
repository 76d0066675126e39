"""What an axis is behind an operation that nobody described: tokens only where something says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz_check import traced
from spellings import B, C, N
from torch import Tensor, fx, nn

import kvt_compile
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import PassResult, run_passes

torch.library.define("kvt_tests::turned", "(Tensor x) -> Tensor")
torch.library.define("kvt_tests::both_turned", "(Tensor x, Tensor y) -> (Tensor, Tensor)")
torch.library.define("kvt_tests::softened", "(Tensor x) -> Tensor")
torch.library.define("kvt_tests::both_softened", "(Tensor x, Tensor y) -> (Tensor, Tensor)")


@torch.library.impl("kvt_tests::turned", "CompositeExplicitAutograd")
@torch.library.register_fake("kvt_tests::turned")
def _turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).clone()


@torch.library.impl("kvt_tests::both_turned", "CompositeExplicitAutograd")
@torch.library.register_fake("kvt_tests::both_turned")
def _both_turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.transpose(-1, -2).clone(), y.transpose(-1, -2).clone()


@torch.library.impl("kvt_tests::softened", "CompositeExplicitAutograd")
@torch.library.register_fake("kvt_tests::softened")
def _softened(x: Tensor) -> Tensor:
    return x.tanh()


@torch.library.impl("kvt_tests::both_softened", "CompositeExplicitAutograd")
@torch.library.register_fake("kvt_tests::both_softened")
def _both_softened(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.tanh(), y.tanh()


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(-1, -2).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].transpose(-1, -2).clone()


class Soften(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


@fx.wrap
def _a_function_of_mine(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).clone()


@fx.wrap
def _another_of_mine(x: Tensor) -> Tensor:
    return x.tanh()


Op = Callable[[Tensor], Tensor]
TURNS: dict[str, Op] = {
    "custom operator": lambda x: torch.ops.kvt_tests.turned(x),
    "overload of a custom operator": lambda x: torch.ops.kvt_tests.turned.default(x),
    "one of several results": lambda x: torch.ops.kvt_tests.both_turned(x * 2, x)[1],
    "autograd.Function": lambda x: Turn.apply(x),
    "strides": lambda x: torch.as_strided(x.contiguous(), (B, C, N), (N * C, 1, C)),
}
"""[B, N, C] -> [B, C, N], by an operation that no table describes."""
KEEPS: dict[str, Op] = {
    "custom operator": lambda x: torch.ops.kvt_tests.softened(x),
    "overload of a custom operator": lambda x: torch.ops.kvt_tests.softened.default(x),
    "one of several results": lambda x: torch.ops.kvt_tests.both_softened(x * 2, x)[1],
    "autograd.Function": lambda x: Soften.apply(x),
    "a pointwise operation of torch": torch.erfinv,
}
UNDERSTOOD: dict[str, Op] = {
    "mT": lambda x: x.mT,
    "packet": lambda x: torch.ops.aten.mT(x),
    "packet with arguments": lambda x: torch.ops.aten.transpose(x, -1, -2),
    "packet of several overloads": lambda x: torch.ops.aten.permute(x, [0, 2, 1]),
    "overload": lambda x: torch.ops.aten.transpose.int(x, -1, -2),
}


class Attention(nn.Module):
    """Over the rows of what `op` makes of each projection, or (`first`) of the tokens."""

    def __init__(self, op: Op, *, first: bool = False, width: int = C) -> None:
        super().__init__()
        self.op, self.first = op, first
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x) if self.first else x
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (q, k, v) if self.first else (self.op(q), self.op(k), self.op(v))
        return (q @ k.mT).softmax(-1) @ v


def found_by_dynamo(module: nn.Module, *inputs: Tensor, **policy: Any) -> PassResult:
    results: list[PassResult] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results.append(run_passes(graph, Policy(topk=2, **policy), lowering="aten"))
        return fx.Interpreter(graph).run

    out = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    (result,) = results
    if not result.changed:
        torch.testing.assert_close(out, module(*inputs))
    return result


def outcome(module: nn.Module, *inputs: Tensor, **policy: Any) -> tuple[str, bool, str]:
    """(axis, whether it was rewritten, why not) of its one site."""
    (decision,) = found_by_dynamo(module, *(inputs or (torch.randn(B, N, C, requires_grad=True),)), **policy).decisions
    return decision.site.axis, decision.topk is not None, decision.reason


@pytest.mark.parametrize("op", TURNS.values(), ids=list(TURNS))
def test_channels_that_an_operation_nobody_described_made_rows(op: Op) -> None:
    axis, rewritten, reason = outcome(Attention(op))
    assert (axis, rewritten) == ("unknown", False)
    assert "not understood" in reason
    assert "unknown_attention" in reason


@pytest.mark.parametrize("op", TURNS.values(), ids=list(TURNS))
def test_the_same_in_front_of_the_projections(op: Op) -> None:
    """The layers of a mixer are applied to channels in this way."""
    axis, rewritten, _ = outcome(Attention(op, first=True, width=N))
    assert (axis, rewritten) == ("unknown", False)


@pytest.mark.parametrize("first", [False, True], ids=["behind the projections", "in front of them"])
@pytest.mark.parametrize("op", KEEPS.values(), ids=list(KEEPS))
def test_neighbour_an_operation_that_keeps_the_shape(op: Op, first: bool) -> None:
    assert outcome(Attention(op, first=first))[:2] == ("token", True)


def valid(x: Tensor) -> Tensor:
    return (x > -9).all(-1, keepdim=True)


MASKED: dict[str, Op] = {
    "mask first": lambda x: valid(x).to(x.dtype) * x,
    "mask second": lambda x: x * valid(x).to(x.dtype),
    "where": lambda x: torch.where(valid(x), x, 0.0),
}


@pytest.mark.parametrize("op", MASKED.values(), ids=list(MASKED))
def test_a_mask_does_not_hide_the_tensor_it_is_broadcast_to(op: Op) -> None:
    assert outcome(Attention(op, first=True))[:2] == ("token", True)
    hidden = Attention(lambda x: op(torch.ops.kvt_tests.turned(x)), first=True, width=N)
    assert outcome(hidden)[:2] == ("unknown", False)


@pytest.mark.parametrize("op", UNDERSTOOD.values(), ids=list(UNDERSTOOD))
def test_a_packet_is_its_overloads(op: Op) -> None:
    assert outcome(Attention(op))[:2] == ("channel", False)
    assert outcome(Attention(lambda x: op(op(x))))[:2] == ("token", True)


def test_what_is_unknown_is_rewritten_when_asked_for() -> None:
    module, x = Attention(TURNS["custom operator"]), torch.randn(B, N, C)
    result = kvt_compile.rewrite(
        torch.export.export(module, (x,)), topk=1.0, force_rewrite=True, unknown_attention="rewrite"
    )
    (site,) = result.report.sites
    assert (site.axis, site.outcome) == ("unknown", "fused")
    torch.testing.assert_close(result.module(x), module(x))


def test_functions_of_a_traced_model() -> None:
    wrapped: tuple[tuple[Op, Any], ...] = (
        (lambda x: _a_function_of_mine(x), ("unknown", False)),
        (lambda x: _another_of_mine(x), ("token", True)),
    )
    for op, expected in wrapped:
        graph = traced(Attention(op), [torch.randn(B, N, C)])
        (decision,) = run_passes(graph, Policy(topk=2), lowering="aten").decisions
        assert (decision.site.axis, decision.topk is not None) == expected


def test_an_axis_of_the_same_size_as_another_may_be_that_one() -> None:
    """A square map that comes back in its own shape may be turned or not."""
    square = torch.randn(B, C, C)
    assert outcome(Attention(KEEPS["custom operator"]), square)[0] == "unknown"
    assert outcome(Attention(torch.tanh), square)[0] == "token"


def test_the_values_tell_where_the_keys_do_not() -> None:
    class Model(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
            self.turned = turned

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            if self.turned:
                q, k, v = q.mT, k.mT, v.mT
            q, k = (torch.ops.kvt_tests.turned(torch.ops.kvt_tests.turned(y)) for y in (q, k))
            return (q @ k.mT).softmax(-1) @ v

    assert outcome(Model(turned=False))[:2] == ("token", True)
    assert outcome(Model(turned=True))[1] is False


def test_an_axis_of_the_graphs_input_is_tokens() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.softmax(q @ k.mT, -1) @ v

    assert outcome(Plain(), *(torch.randn(B, N, C) for _ in range(3)))[:2] == ("token", True)


class Pooling(nn.Module):
    """A layer of each token, a softmax over the tokens: no attention, whatever was done to the layer's weight."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.randn(3, C)), make

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.make(self.weight)).softmax(1).mT @ x


@pytest.mark.parametrize(
    "make",
    [lambda w: w, lambda w: torch.ops.kvt_tests.softened(w), lambda w: w / w.norm(dim=1, keepdim=True)],
    ids=["as it is", "custom operator", "normalised"],
)
def test_a_layer_whose_weight_was_made_of_a_parameter(make: Op) -> None:
    result = found_by_dynamo(Pooling(make), torch.randn(B, N, C))
    assert not result.decisions
    assert "product of two computed tensors" in result.refusals[0].reason


def test_parts_of_a_split_with_every_argument_by_name() -> None:
    """torch.split calls its input `tensor`, and SHViT splits maps along their channels."""

    class Model(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.qkv, self.turned = nn.Conv1d(C, 3 * C, 1), turned

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = torch.split(tensor=self.qkv(x.mT), split_size_or_sections=[C, C, C], dim=1)
            if self.turned:
                q, k, v = q.mT, k.mT, v.mT
            return (q.mT @ k).softmax(-1) @ v.mT

    assert outcome(Model(turned=False))[:2] == ("token", True)
    assert outcome(Model(turned=True))[:2] == ("channel", False)


class Normed(nn.Module):
    """Channels are channels behind what normalises them, too."""

    def __init__(self, norm: nn.Module, turned: bool) -> None:
        super().__init__()
        self.qkv, self.norm, self.turned = nn.Linear(C, 3 * C), norm, turned

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.norm(y) for y in self.qkv(x).chunk(3, -1))
        if self.turned:
            q, k, v = q.mT, k.mT, v.mT
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("norm", [nn.LayerNorm(C), nn.RMSNorm(C), nn.Softmax(-1), nn.GELU(), nn.PReLU()], ids=repr)
def test_layers_that_keep_axes(norm: nn.Module) -> None:
    assert outcome(Normed(norm, turned=True))[0] == "channel"
    assert outcome(Normed(norm, turned=False))[:2] == ("token", True)


@pytest.mark.parametrize(("pixels", "expected"), [(True, ("token", True)), (False, ("channel", False))])
def test_the_pixels_of_a_column_are_not_its_channels(pixels: bool, expected: tuple[str, bool]) -> None:
    """F.unfold writes [B, channels*pixels, columns]: attention over the pixels of a patch (TNT), or its channels."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, width = nn.Conv2d(3, 8, 3, padding=1), 8 if pixels else 4
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

        def forward(self, image: Tensor) -> Tensor:
            columns = F.unfold(self.conv(image), 2, stride=2).transpose(1, 2)
            x = columns.reshape(-1, 8, 4)
            x = x.transpose(1, 2) if pixels else x
            return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)

    assert outcome(Model(), torch.randn(2, 3, 6, 6))[:2] == expected
