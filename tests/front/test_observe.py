"""`observe`: what reaches each attention while the model runs, and that looking changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from factories import Attention, Stack, stack, stack_with_bias
from nets import Checkpointed, TalkingHeads
from torch import Tensor, fx, nn

import kvt_compile
from kvt_compile.kernels.plain.reference import reference_attention
from kvt_compile.observe import AttentionCall, SiteCall, SoftmaxCall, kept_keys, observe


def calls_of(model: Any, inputs: Sequence[Any], **more: Any) -> tuple[list[SiteCall], Any]:
    calls: list[SiteCall] = []
    output = observe(model, inputs, lambda call: calls.append(call), **more)
    return calls, output


class Breaks(Stack):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.blocks[0](x, bias)
        torch._dynamo.graph_break()
        return self.blocks[1](x, bias)


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense_scores(call: AttentionCall) -> Tensor:
    """t in float64 by the reference: with the identity as values and every key, log of the output is t - logsumexp."""
    keys = call.k.shape[2]
    values = torch.eye(keys, dtype=torch.float64).expand(*call.k.shape[:2], -1, -1)
    whole = reference_attention(call.q, call.k, values, call.captured, topk=keys, score=call.score, sizes=call.sizes)
    return whole.out.log() + whole.logsumexp.unsqueeze(-1)


class TestCalls:
    def test_every_site_in_order_and_the_models_own_output(self) -> None:
        model, inputs = stack()
        calls, output = calls_of(model, inputs, topk=4)
        assert [(c.number, c.where.module, c.topk, c.shape) for c in calls] == [
            (0, "blocks.0", 4, (2, 2, 10, 10)),
            (1, "blocks.1", 4, (2, 2, 10, 10)),
        ]
        assert [c.report.module for c in calls if c.report] == ["blocks.0", "blocks.1"]
        assert torch.equal(output, kvt_compile.rewrite(model, *inputs, topk=4).module(*inputs))

    @torch.no_grad()
    def test_forced_at_every_key_it_is_the_dense_model(self) -> None:
        model, inputs = stack()
        _, output = calls_of(model, inputs, topk=1.0, force_rewrite=True)
        exact = model.double()(*(x.double() for x in inputs))
        plain = model.float()(*inputs)
        budget = 8 * float((plain - exact).abs().max()) + torch.finfo(torch.float32).eps
        assert float((output - exact).abs().max()) <= budget

    def test_a_site_left_dense_is_not_called(self) -> None:
        model, inputs = stack()
        calls, _ = calls_of(model, inputs, topk={"blocks.1": 3})
        assert [(c.number, c.where.module) for c in calls] == [(0, "blocks.1")]

    def test_what_the_callback_returns_stands_for_the_output(self) -> None:
        model, inputs = stack()
        result = kvt_compile.rewrite(model, *inputs, topk=9)
        narrow = observe(result, inputs, lambda call: call.output(2))
        assert torch.equal(narrow, kvt_compile.rewrite(model, *inputs, topk=2).module(*inputs))
        assert not torch.equal(narrow, result.module(*inputs))

    @pytest.mark.parametrize("model", [Breaks, Checkpointed], ids=["graph break", "checkpointed bodies"])
    def test_sites_of_several_graphs_are_counted_through(self, model: type[nn.Module]) -> None:
        calls, _ = calls_of(model().train(), (torch.randn(2, 10, 16, requires_grad=True),), topk=3)
        assert [(c.number, c.topk) for c in calls] == [(0, 3), (1, 3)]

    def test_talking_heads_give_their_own_scores(self) -> None:
        model = TalkingHeads()
        (call,), output = calls_of(model, (torch.randn(2, 10, 16),), topk=3)
        assert isinstance(call, SoftmaxCall)
        assert call.shape == (2, 2, 10, 10)
        (chunk,) = call.scores()
        assert torch.equal(chunk.t, call.raw)
        assert call.output().count_nonzero() == 2 * 2 * 10 * 3
        assert output.shape == (2, 10, 16)

    def test_nothing_of_the_model_changes(self) -> None:
        class Counting(Stack):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("runs", torch.zeros(()))

            def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
                self.runs.add_(1)
                return super().forward(x, bias)

        model = Counting()
        before, state = {n: x.clone() for n, x in model.state_dict().items()}, torch.get_rng_state()
        calls, output = calls_of(model, (torch.randn(2, 10, 16, generator=torch.Generator()),), topk=3)
        assert len(calls) == 2
        assert not output.requires_grad
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_rewritten_module_keeps_its_graph(self) -> None:
        model, inputs = stack()
        result = kvt_compile.rewrite(model, *inputs, topk=4)
        assert isinstance(result.module, fx.GraphModule)
        before, code = result.module(*inputs), result.module.code
        for subject in (result, result.module):
            assert len(calls_of(subject, inputs)[0]) == 2
        assert result.module.code == code
        assert torch.equal(result.module(*inputs), before)

    def test_exported_program(self) -> None:
        model, inputs = stack()
        program = torch.export.export(model, inputs)
        calls, output = calls_of(program, inputs, topk=4)
        assert [c.where.module for c in calls] == ["blocks.0", "blocks.1"]
        assert torch.equal(output, calls_of(model, inputs, topk=4)[1])


class TestScores:
    @pytest.mark.parametrize("rows", [None, 1, 4], ids=["one chunk", "single rows", "rows of 4"])
    def test_are_the_references(self, rows: int | None) -> None:
        model, inputs, kwargs = stack_with_bias()
        calls, _ = calls_of(model, inputs, kwargs=kwargs, topk=4)
        for call in calls:
            assert isinstance(call, AttentionCall)
            assert len(call.captured) == 1
            chunks = list(call.scores(rows=rows))
            assert [n for chunk in chunks for n in chunk.queries] == list(range(10))
            assert all(chunk.t.shape[2] == len(chunk.queries) <= (rows or 10) for chunk in chunks)
            exact, t = dense_scores(call), torch.cat([chunk.t for chunk in chunks], 2)
            plain = call.q @ call.k.transpose(-1, -2) * 8**-0.5 + kwargs["bias"].unsqueeze(1)
            budget = 8 * float((plain - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.abs().max())
            assert float((t - exact).abs().max()) <= budget

    def test_grouped_queries_and_a_causal_mask(self) -> None:
        q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
        (call,), _ = calls_of(Grouped(), (q, k, v), topk=3)
        (chunk,) = call.scores()
        expected = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
        expected = expected.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
        # eight products and sums, each rounded once, in another order
        torch.testing.assert_close(chunk.t, expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps * 8)
        kept = kept_keys(chunk.t, 3)
        assert kept.sum(-1).tolist() == [[[1, 2, 3, 3, 3, 3]] * 4] * 2

    def test_only_the_queries_asked_for(self) -> None:
        model, inputs = stack()
        (call, _), _ = calls_of(model, inputs, topk=4)
        (whole,) = call.scores()
        chunks = list(call.scores([7, 0, 8, 7]))
        assert [chunk.queries for chunk in chunks] == [range(1), range(7, 9)]
        for chunk in chunks:
            torch.testing.assert_close(chunk.t, whole.t[:, :, chunk.queries.start : chunk.queries.stop])

    @pytest.mark.parametrize("queries", [[10], [-1], range(5, 11)], ids=str)
    def test_a_query_that_does_not_exist(self, queries: Sequence[int]) -> None:
        model, inputs = stack()
        (call, _), _ = calls_of(model, inputs, topk=4)
        with pytest.raises(IndexError, match="the queries are 0 to 9"):
            list(call.scores(queries))

    def test_chunks_are_tiles(self) -> None:
        from kvt_compile.kernels.plain.tiling import CPU_BUDGET

        q = torch.randn(1, 2, 3000, 4)
        (call,), _ = calls_of(Grouped(), (q, q, q), topk=10)
        sizes = [chunk.t.numel() for chunk in call.scores(range(500))]
        assert len(sizes) > 1
        assert max(sizes) <= CPU_BUDGET

    def test_half_precision_is_widened(self) -> None:
        q = torch.randn(1, 2, 6, 4, dtype=torch.bfloat16)
        (call,), _ = calls_of(Grouped(), (q, q, q), topk=10, force_rewrite=True)
        (chunk,) = call.scores()
        assert chunk.t.dtype == torch.float32

    def test_ties_are_kept_together_and_nothing_invalid(self) -> None:
        t = torch.tensor([[3.0, 1.0, 1.0, 0.0], [2.0, -torch.inf, -torch.inf, -torch.inf]])
        assert kept_keys(t, 2).tolist() == [[True, True, True, False], [True, False, False, False]]
        assert kept_keys(t, 9).sum(-1).tolist() == [4, 1]


class TestMistakes:
    def test_options_for_a_rewritten_model(self) -> None:
        model, inputs = stack()
        result = kvt_compile.rewrite(model, *inputs, topk=4)
        with pytest.raises(kvt_compile.OptionError, match="rewritten already: topk"):
            observe(result, inputs, lambda call: None, topk=3)

    def test_a_pattern_without_a_site(self) -> None:
        model, inputs = stack()
        with pytest.raises(kvt_compile.OptionError, match=r"the sites are: blocks\.0, blocks\.1"):
            observe(model, inputs, lambda call: None, topk={"layers.*": 3})

    def test_not_a_model(self) -> None:
        with pytest.raises(TypeError, match="got int"):
            observe(3, (), lambda call: None)  # type: ignore[arg-type]

    def test_an_unknown_option(self) -> None:
        with pytest.raises(kvt_compile.OptionError, match="topk"):
            observe(Attention(), (torch.randn(2, 4, 16),), lambda call: None, topkk=3)
