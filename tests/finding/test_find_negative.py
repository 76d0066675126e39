"""What looks like attention and is not stays as it is, and every softmax that stays says why."""

from __future__ import annotations

import pytest
import spellings_lookalikes
import torch
from fuzz_check import traced
from spelling_checks import assert_fates, assert_meaning, rewritten_by
from spellings import Spelling, cases, from_file, spelling_of

import kvt_compile

mine = from_file(spellings_lookalikes)


@cases(mine)
def test_by_dynamo(spelling: Spelling) -> None:
    """The graph is the one that came in: not a node more, not a node less."""
    rewritten = rewritten_by(spelling, torch.float32)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float32, selecting=False)
    if not spelling.positive:
        assert not rewritten.result.changed


@cases(mine)
def test_traced(spelling: Spelling) -> None:
    rewritten = rewritten_by(spelling, torch.float64, traced)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float64, selecting=spelling.positive)


_BY_EXPORT = (
    "softmax_pooling", "weights_from_a_linear_layer", "external_attention", "linear_attention", "slots",
    "channel_attention", "batch_attention",
)  # fmt: skip


@pytest.mark.parametrize("name", _BY_EXPORT)
def test_by_export(name: str) -> None:
    spelling = spelling_of(name)
    program = torch.export.export(spelling.build(), tuple(spelling.tensors()))
    report = kvt_compile.rewrite(program, topk=2).report
    assert [site.outcome for site in report.sites] == [fate for fate in spelling.fates if fate == "dense"]
    assert len(report.refusals) == spelling.fates.count("refused")
    assert all(refusal.reason for refusal in report.refusals)


@pytest.mark.parametrize(
    ("name", "option", "axis"),
    [
        ("channel_attention", "channel_attention", "channel"),
        ("channel_attention_of_groups", "channel_attention", "channel"),
        ("channel_attention_of_maps", "channel_attention", "channel"),
        ("batch_attention", "batch_attention", "batch"),
    ],
)
def test_other_axes_are_rewritten_when_asked_for(name: str, option: str, axis: str) -> None:
    spelling = spelling_of(name)
    module, inputs = spelling.build(), spelling.tensors()
    result = kvt_compile.rewrite(module, *inputs, topk=1.0, force_rewrite=True, **{option: "rewrite"})
    (site,) = result.report.sites
    assert (site.axis, site.outcome) == (axis, "fused")
    torch.testing.assert_close(result.module(*inputs), module(*inputs), rtol=1e-9, atol=1e-9)
