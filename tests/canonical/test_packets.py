"""A packet means its overloads: in the table of spellings, among composites, and in what it writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spellings import B, C, D, H, N
from torch import Tensor, fx, nn

import kvt_compile
from kvt_compile.capture.outside import calls_outside
from kvt_compile.passes.canonical.packets import resolve_packets
from kvt_compile.passes.canonical.spellings import canonical_name
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes

aten = torch.ops.aten

torch.library.define("kvt_tests::into", "(Tensor x, Tensor(a!) target) -> ()")


@torch.library.impl("kvt_tests::into", "CompositeExplicitAutograd")
def _into(x: Tensor, target: Tensor) -> None:
    target.add_(x)


@torch.library.register_fake("kvt_tests::into")
def _into_fake(x: Tensor, target: Tensor) -> None: ...


def captured(module: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, Any, Any]:
    """(graph, what was found, result) with every site rewritten and keeping all its keys."""
    kept: list[Any] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        kept.extend((graph, run_passes(graph, Policy(topk=1.0, force_rewrite=True), lowering="aten")))
        return fx.Interpreter(graph).run

    out = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return kept[0], kept[1], out


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return tuple(torch.randn(B, H, N, D) for _ in range(3))


SPELLED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mT": lambda q, k, v: aten.matmul(aten.softmax(aten.mul(aten.matmul(q, aten.mT(k)), 0.5), -1), v),
    "transpose": lambda q, k, v: aten.softmax(aten.div(q @ aten.transpose(k, -1, -2), 2), -1) @ v,
    "masked": lambda q, k, v: aten.softmax(aten.masked_fill(q @ k.mT, torch.ones(N, N).triu(1).bool(), -1e9), -1) @ v,
    "added in place": lambda q, k, v: aten.softmax(aten.add_(q @ k.mT, 1.0), -1) @ v,
    "sdpa": lambda q, k, v: aten.scaled_dot_product_attention(q, k, v),
    "by parts": lambda q, k, v: aten.bmm(
        aten._softmax(aten.bmm(aten.flatten(q, 0, 1), aten.flatten(k, 0, 1).mT), -1, False), aten.flatten(v, 0, 1)
    ),
}


@pytest.mark.parametrize("function", SPELLED.values(), ids=list(SPELLED))
def test_packets_are_spellings(function: Callable[..., Tensor]) -> None:
    graph, found, out = captured(function, *qkv())
    assert found.changed, found.refusals
    assert [decision.site.tier for decision in found.decisions] == ["fused"]
    assert not [n for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverloadPacket)]
    torch.testing.assert_close(out, function(*qkv()))


def test_neighbour_a_packet_of_somebody_else() -> None:
    """`kvt_tests::softmax` is not torch's softmax."""
    torch.library.define("kvt_tests::softmax", "(Tensor x, int dim) -> Tensor")
    torch.library.impl("kvt_tests::softmax", "CompositeImplicitAutograd")(lambda x, dim: x.sigmoid())
    packet = torch.ops.kvt_tests.softmax
    assert canonical_name(packet) is None
    assert canonical_name(packet.default) is None
    _, found, _ = captured(lambda q, k, v: packet(q @ k.mT, -1) @ v, *qkv())
    assert not found.changed


@pytest.mark.parametrize(
    "write",
    [
        lambda s: torch.ops.kvt_tests.into(torch.ones(N, N).tril() * 3, s),
        lambda s: torch.ops.kvt_tests.into.default(torch.ones(N, N).tril() * 3, s),
        lambda s: torch.ops.kvt_tests.into(torch.ones(N, N).tril() * 3, target=s[:, 0]),
    ],
    ids=["packet", "overload", "a view, by keyword"],
)
def test_what_a_custom_operator_writes_to_is_no_product(write: Callable[[Tensor], None]) -> None:
    """Only its schema says that it writes, and to which argument."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        write(scores)
        return scores.softmax(-1) @ v

    _, found, out = captured(model, *qkv())
    assert "fused" not in [decision.site.tier for decision in found.decisions]
    torch.testing.assert_close(out, model(*qkv()))


def test_neighbour_what_it_reads_stays_what_it_was() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores, beside = q @ k.mT, torch.zeros(N, N)
        torch.ops.kvt_tests.into(torch.ones(N, N), beside)
        return scores.softmax(-1) @ v, beside

    _, found, out = captured(model, *qkv())
    assert found.changed
    torch.testing.assert_close(out, model(*qkv()))


def test_a_packet_keeps_its_numbers_and_sizes() -> None:
    """Which overload runs depends on what it is given: a tensor or a number, a dimension or none."""

    def model(x: Tensor) -> Tensor:
        return aten.add(aten.max(x, 1)[0], 1) + aten.max(x) + aten.view(x, [x.shape[0], -1])[:, :C]

    traced = fx.symbolic_trace(model)
    resolve_packets(traced)  # nothing is known of its values: it stays as it is
    x = torch.randn(B, N, C)
    torch.testing.assert_close(traced(x), model(x))
    graph, _, out = captured(model, x)
    torch.testing.assert_close(out, model(x))
    targets = {str(n.target) for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {"aten.max.dim", "aten.max.default", "aten.add.Tensor", "aten.view.default"} <= targets


def test_a_packet_of_a_composite_is_expanded() -> None:
    layer = nn.TransformerEncoderLayer(C, H, 2 * C, batch_first=True).eval()
    attention, x = layer.self_attn, torch.randn(B, N, C)

    def model(x: Tensor) -> Tensor:
        return aten._transformer_encoder_layer_fwd(
            x, C, H, attention.in_proj_weight, attention.in_proj_bias,
            attention.out_proj.weight, attention.out_proj.bias,
            False, False, 1e-5, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
            layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        )  # fmt: skip

    with torch.no_grad():
        _, found, out = captured(model, x)
        assert [decision.site.tier for decision in found.decisions] == ["fused"]
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_calls_outside_of_every_graph_may_be_packets() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return aten.softmax(q @ k.mT, -1) @ v

    ((name, where),) = calls_outside(Model(), qkv(), {}, ())
    assert name == "softmax"
    assert where.file == __file__
    assert kvt_compile.explain(Model(), *qkv()).sites
