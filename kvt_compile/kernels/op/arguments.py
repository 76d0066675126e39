"""A call of an operator -> a record of its arguments, under the names that the operator's schema gives them.

    kvt::attention(q, k, v, ..., lowering="c")  --binder-->  AttentionArguments(q=..., k=..., ..., tolerance=0.0)

What runs an operator, what fakes it and what traces it take the record; the order of the arguments stands in the schema
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound="AttentionArguments | SoftmaxArguments | SoftmaxBackwardArguments")


@dataclass(slots=True)  # not frozen: that would cost every call another two microseconds
class AttentionArguments:
    """Of `kvt::attention`; shapes are those of `AttentionCall`."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: Sequence[Tensor] | None
    """None is no tensor, as is an empty list; `sizes` likewise."""
    score: str
    weight: str
    topk: int
    sizes: Sequence[int] | None
    dropout_p: float
    seed: Tensor | None
    lowering: str
    tolerance: float = 0.0
    draw: Sequence[int] | None = None
    select: str = ""
    grid: Sequence[int] | None = None
    prefix: int = 0


@dataclass(slots=True, kw_only=True)
class BackwardArguments(AttentionArguments):
    """Of `kvt::attention_backward`: those of the forward but its tolerance, and what it returned."""

    grad_out: Tensor
    out: Tensor
    logsumexp: Tensor
    threshold: Tensor
    needs_grad: Sequence[bool]
    """One for each of q, k, v and the captured tensors."""


@dataclass(slots=True)
class SoftmaxArguments:
    """Of `kvt::topk_softmax`."""

    scores: Tensor
    dim: int
    topk: int
    dtype: torch.dtype
    lowering: str
    tolerance: float = 0.0


@dataclass(slots=True)
class SoftmaxBackwardArguments:
    """Of `kvt::topk_softmax_backward`."""

    grad: Tensor
    weights: Tensor
    dim: int
    input_dtype: torch.dtype
    lowering: str


def binder(record: type[Record], op: torch._ops.OpOverload) -> Callable[..., Record]:
    """The function that makes a record of an operator's positional and keyword arguments.

    Raises TypeError where the schema has an argument that the record has not, or lacks one that has no default.
    """
    names = tuple(argument.name for argument in op._schema.arguments)
    known = {field.name: field.default is MISSING for field in fields(record)}
    wrong = [name for name in names if name not in known]
    wrong += [name for name, required in known.items() if required and name not in names]
    if wrong:
        raise TypeError(f"{record.__name__} does not fit the schema of {op}: {', '.join(wrong)}")
    if names == tuple(field.name for field in fields(record) if not field.kw_only):
        return record  # its own order is the schema's: nothing to look up, which would cost two microseconds

    def bind(*args: Any, **kwargs: Any) -> Record:
        return record(**dict(zip(names, args, strict=False)), **kwargs)  # defaults at the end may be missing

    return bind
