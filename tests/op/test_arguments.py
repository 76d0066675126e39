"""A record of an operator's arguments holds what its schema names, in whatever way the operator is called."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from kvt_compile.kernels.op import ops
from kvt_compile.kernels.op.arguments import (
    AttentionArguments,
    BackwardArguments,
    SoftmaxArguments,
    SoftmaxBackwardArguments,
    binder,
)

kvt = torch.ops.kvt
RECORDS: list[tuple[Any, Any, set[str]]] = [
    (AttentionArguments, kvt.attention.default, set()),
    (BackwardArguments, kvt.attention_backward.default, {"tolerance"}),  # its thresholds say what was kept
    (SoftmaxArguments, kvt.topk_softmax.default, set()),
    (SoftmaxBackwardArguments, kvt.topk_softmax_backward.default, set()),
]


@pytest.mark.parametrize(("record", "op", "beside"), RECORDS, ids=lambda x: getattr(x, "__name__", None))
def test_a_record_has_the_names_and_defaults_of_the_schema(record: Any, op: Any, beside: set[str]) -> None:
    arguments = {x.name: x for x in op._schema.arguments}
    assert {field.name for field in fields(record)} - set(arguments) == beside
    for field in fields(record):
        if field.name in arguments and arguments[field.name].has_default_value():
            assert field.default == arguments[field.name].default_value


def test_by_place_by_name_and_with_the_last_left_out() -> None:
    scores = torch.randn(2, 3)
    by_place = ops.softmax_arguments(scores, -1, 2, torch.float32, "aten", 0.25)
    assert (by_place.scores, by_place.dim, by_place.lowering, by_place.tolerance) == (scores, -1, "aten", 0.25)
    mixed = ops.softmax_arguments(scores, -1, dtype=torch.float32, topk=2, lowering="aten")
    assert (mixed.topk, mixed.dtype, mixed.tolerance) == (2, torch.float32, 0.0)


@pytest.mark.parametrize("how", ["real", "fake"])
def test_the_operators_take_names_too(how: str) -> None:
    q = torch.randn(1, 1, 3, 4, device="cpu" if how == "real" else "meta")
    out = kvt.attention(
        q, q, q, [], "s", weight="p", sizes=[], topk=2, seed=None, dropout_p=0.0, lowering="aten", tolerance=0.0
    )[0]
    assert out.shape == q.shape
    assert kvt.topk_softmax(q, topk=2, dim=-1, lowering="aten", dtype=torch.float32).shape == q.shape


def test_a_record_that_does_not_fit_is_an_error() -> None:
    @dataclass
    class Short:
        scores: torch.Tensor

    @dataclass
    class Long(Short):
        more: int

    with pytest.raises(TypeError, match=r"Short does not fit .*topk_softmax.*: dim, topk, dtype, lowering, tolerance"):
        binder(Short, kvt.topk_softmax.default)
    with pytest.raises(TypeError, match=r"more$"):
        binder(Long, kvt.topk_softmax.default)


def test_what_calls_the_operators_elsewhere_imports_their_name() -> None:
    import kvt_compile.kernels.ops as names

    assert names.__doc__
