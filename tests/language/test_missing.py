"""What a weight expression makes of NaN."""

from __future__ import annotations

import pytest
import torch

from kvt_compile.kernels.language import missing
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.plain.reference import reference_attention

ZERO = {
    "where(ne(p, p), 0.0, p)": "p",
    "c0[h]*where(ne(p, p), 0.0, p)": "c0[h]*p",
    "where(ne(p, p), 0.0, p)/c0[h]": "p/c0[h]",
    "where(gt(p, 0.1), p, 0.0)": "where(gt(p, 0.1), p, 0.0)",
    "where(logical_or(ne(p, p), lt(p, 0.2)), 0.0, p)": "where(logical_or(ne(p, p), lt(p, 0.2)), 0.0, p)",
    "where(logical_not(eq(p, p)), 0.0, p)": "where(logical_not(eq(p, p)), 0.0, p)",
}
OTHER = ["p", "0.5*p*c0[h]", "relu(p)", "where(ne(p, p), 1.0, p)", "where(lt(c0[h], 2.0), p, 0.0)", "1.0 - p"]


@pytest.mark.parametrize("text", [*ZERO, *OTHER])
def test_the_answer_is_what_torch_computes(text: str) -> None:
    expression = language.parse(text)
    assert missing.zero_for_nan(expression) == (text in ZERO)
    q, k, v = torch.ones(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 2)
    q[0, 0, 1, 0] = torch.nan
    captured = [torch.ones(1)] if "c0" in text else []
    row = reference_attention(q, k, v, captured, topk=3, weight=text).out[0, 0, 1]
    assert text not in ZERO or not row.any()


@pytest.mark.parametrize("text", ZERO)
def test_of_a_number_the_question_for_nan_is_gone(text: str) -> None:
    assert language.to_text(missing.of_numbers(language.parse(text))) == ZERO[text]
