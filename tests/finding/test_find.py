"""Every spelling of attention is found, in the tier and with the expression it should have, and means the same."""

from __future__ import annotations

import pytest
import spellings_parts
import spellings_products
import spellings_scores
import spellings_weights
import torch
from fuzz_check import traced
from spelling_checks import assert_fates, assert_meaning, rewritten_by
from spellings import Spelling, cases, from_file, spelling_of

import kvt_compile

mine = from_file(spellings_parts, spellings_products, spellings_scores, spellings_weights)


@cases(mine)
def test_by_dynamo(spelling: Spelling) -> None:
    """torch.compile's capture, float32: fates, texts, and k = N in outputs and every gradient."""
    rewritten = rewritten_by(spelling, torch.float32)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float32, selecting=False)


@cases(mine)
def test_fewer_keys(spelling: Spelling) -> None:
    """float64: k = N, k < N against k-NN softmax by hand, and the reference lowering."""
    rewritten = rewritten_by(spelling, torch.float64, traced if spelling.traceable else None)
    assert_fates(rewritten)
    assert_meaning(spelling, rewritten, torch.float64, selecting=True)


# what differs most between captures: layouts, sizes that are read off tensors, captured tensors, composites
_OTHER_CAPTURES = (
    "bmm_with_heads_in_the_batch", "einsum_with_keys_first", "convolution_maps", "batch_second", "windows", "grid",
    "single_query", "learned_query", "cross_attention", "pooled_keys", "halo_keys", "cached_keys", "heads_by_expand",
    "sdpa_bool_mask", "multihead_attention", "multihead_attention_with_weights", "scale_by_the_root_of_the_width",
    "scale_learned_on_q_with_a_bias", "bias_from_a_table", "bias_and_window_mask", "bias_computed_from_q",
    "mask_as_an_input", "rows_but_the_first", "every_third_row", "scores_of_one_row", "keys_but_the_first",
    "softmax_by_hand", "head_gate", "talking_heads", "positional_gate", "sink_column",
)  # fmt: skip


# a batch of a size known only at run time cannot be proved to be whole images of two windows
@pytest.mark.parametrize("name", [name for name in _OTHER_CAPTURES if name != "bias_and_window_mask"])
def test_by_rewrite(name: str) -> None:
    """`rewrite` of the module (symbolic_trace, else export): the first dimension is dynamic there."""
    spelling = spelling_of(name)
    module = spelling.build()
    result = kvt_compile.rewrite(module, *spelling.tensors(), topk=1.0, force_rewrite=True)
    assert [site.outcome for site in result.report.sites] == [fate for fate in spelling.fates if fate != "refused"]
    assert len(result.report.refusals) == spelling.fates.count("refused")
    torch.testing.assert_close(result.module(*spelling.tensors()), module(*spelling.tensors()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", _OTHER_CAPTURES)
def test_by_export(name: str) -> None:
    spelling = spelling_of(name)
    module = spelling.build()
    program = torch.export.export(module, tuple(spelling.tensors()))
    result = kvt_compile.rewrite(program, topk=1.0, force_rewrite=True)
    assert [site.outcome for site in result.report.sites] == [fate for fate in spelling.fates if fate != "refused"]
    assert len(result.report.refusals) == spelling.fates.count("refused")
    torch.testing.assert_close(result.module(*spelling.tensors()), module(*spelling.tensors()), rtol=1e-9, atol=1e-9)


_DYNAMIC_ROWS: dict[str, tuple[list[str], ...]] = {
    "rows_but_the_first": ([], ["scores-kept"]),  # torch 2.14 knows the size of the slice, those before do not
    "rows_but_the_last": (["scores-kept"],), "every_third_row": ([],), "scores_of_one_row": (["fused"],),
}  # fmt: skip


@pytest.mark.parametrize("name", _DYNAMIC_ROWS)
def test_part_of_a_dynamic_axis(name: str) -> None:
    """How many rows a slice has may be a size that no operand has: then nothing is fused, and nothing fails."""
    spelling = spelling_of(name)
    module, tensors = spelling.build(), tuple(spelling.tensors())
    dynamic = tuple({2: torch.export.Dim("tokens", min=5, max=64)} for _ in tensors)
    result = kvt_compile.rewrite(
        torch.export.export(module, tensors, dynamic_shapes=dynamic), topk=1.0, force_rewrite=True
    )
    assert [site.outcome for site in result.report.sites] in _DYNAMIC_ROWS[name]
    assert len(result.report.sites) + len(result.report.refusals) == 1
    longer = tuple(torch.cat([x, x.flip(2)], 2) for x in tensors)
    torch.testing.assert_close(result.module(*longer), module(*longer), rtol=1e-9, atol=1e-9)
