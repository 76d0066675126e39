"""Sample inputs as a user has them -> batches to measure on, and others to check on.

Tensor | (args) | {kwargs} | an iterable of these   ->   [Batch], each cut at random into a measured and a checked part
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class CalibrationError(ValueError):
    """Data or a budget that nothing can be calibrated with."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of one call, `model(*args, **kwargs)`; examples run along the first dimension of its first tensor."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many examples there are.  Raises CalibrationError where there is no tensor."""
        for x in pytree.tree_leaves((self.args, dict(self.kwargs))):
            if isinstance(x, Tensor) and x.dim():
                return int(x.shape[0])
        raise CalibrationError("a batch of the data holds no tensor; expected the inputs of one call of the model")

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What a captured graph may depend on."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)

    @property
    def shapes_but_first(self) -> tuple[Any, ...]:
        """The same, for a graph whose first dimensions may be any number but one."""
        return tuple(((x[0][0] > 1, *x[0][1:]), *x[1:]) if isinstance(x, tuple) and x[0] else x for x in self.shapes)

    def take(self, examples: Tensor) -> Batch:
        """Some of its examples; a tensor of another length is taken to belong to all of them."""
        size = self.size

        def cut(x: Tensor) -> Tensor:
            return x[examples.to(x.device)] if x.dim() and x.shape[0] == size else x

        args, kwargs = pytree.tree_map_only(Tensor, cut, (self.args, dict(self.kwargs)))
        return Batch(args, kwargs)


def as_batches(data: Any) -> list[Batch]:
    """One batch (a tensor, a tuple of arguments, a mapping of keyword arguments) or an iterable of batches -> batches.

    Raises CalibrationError for anything else, and for no data at all.
    """
    one = as_batch(data)
    if one is not None:
        return [one]
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise CalibrationError(
            f"data is {type(data).__name__}, expected a tensor, a tuple of arguments, a mapping of keyword arguments, "
            "or an iterable of these such as a DataLoader"
        )
    batches = []
    for item in data:
        batch = as_batch(tuple(item) if isinstance(item, list) else item)
        if batch is None:
            raise CalibrationError(
                f"a batch of the data is {type(item).__name__}, expected a tensor, a tuple of arguments or a mapping"
            )
        batches.append(batch)
    if not batches:
        raise CalibrationError("data has no batches")
    return batches


def as_batch(item: Any) -> Batch | None:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, tuple):
        return Batch(item)
    if isinstance(item, Mapping):
        return Batch((), item)
    return None


LEAST = 4
"""Examples that each part must have: fewer say nothing about a mean."""


def split(batches: Sequence[Batch], holdout: float, batch_size: int) -> tuple[list[Batch], list[Batch]]:
    """(to measure, to check), in batches of at most `batch_size`; always the same cut of the same data.

    Raises CalibrationError where a part would have fewer than LEAST examples.
    """
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    counts = [0, 0]
    for batch in batches:
        order = torch.randperm(batch.size, generator=generator)
        # whichever part has too few so far gets the odd example, so that batches of one example are dealt out too
        checked = round((sum(counts) + len(order)) * holdout) - counts[1]
        for part, examples in ((1, order[:checked]), (0, order[checked:])):
            counts[part] += len(examples)
            parts[part].extend(batch.take(some) for some in examples.split(batch_size) if len(some))
    if min(counts) < LEAST:
        raise CalibrationError(
            f"{counts[0]} examples to measure and {counts[1]} to check are too few: give at least {2 * LEAST} "
            "(32 or more make the margin small), and a holdout that leaves some for both"
        )
    return parts
