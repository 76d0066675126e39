"""Which axis of which input is the batch, as a user says it -> whether a site attends over it.

batch_dim = 0                   axis 0 of every input of the model
batch_dim = {"x": 0, "y": 1}    of these; the others have none

Attention over the batch is the same graph as attention over tokens, where only linear layers stand between it and the
input: nothing but the user can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvt_compile.passes.site import AttentionSite

BatchDim = int | None | Mapping[str, int | None]


def validate_batch_dim(batch_dim: Any) -> None:
    """Raises TypeError unless it is an axis counted from 0, a mapping from the name of an input to one, or None."""
    if isinstance(batch_dim, Mapping):
        wrong = next((name for name in batch_dim if not isinstance(name, str)), None)
        if wrong is not None:
            raise TypeError(f"batch_dim: {wrong!r} is no name of an input, expected one such as 'x'")
    for axis in batch_dim.values() if isinstance(batch_dim, Mapping) else (batch_dim,):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis < 0):
            raise TypeError(
                f"batch_dim is {axis!r}, expected an axis of the inputs counted from 0, or a mapping from the name of "
                "an input to one"
            )


def batch_of(site: AttentionSite, batch_dim: BatchDim) -> int | None:
    """The batch's axis, if the keys of the site run over it."""
    came = site.keys_from
    if came is None or batch_dim is None:
        return None
    axis = batch_dim.get(came.input) if isinstance(batch_dim, Mapping) else batch_dim
    return axis if axis in came.axes else None


def why_batch(site: AttentionSite, axis: int) -> str:
    came = site.keys_from
    assert came is not None
    if len(came.axes) == 1:
        return f"it attends over the batch (axis {axis} of input {came.input}, by batch_dim)"
    return f"it attends over the batch among others ({came} together, of which axis {axis} is the batch by batch_dim)"


def no_such_batch(batch_dim: BatchDim, inputs: Mapping[str, int]) -> str | None:
    """A sentence about an axis or an input that the model does not have; None where all is well, or cannot be told.

    inputs: name -> number of axes of what the captured graphs read; the empty name where some of it is no input of the
    model, so that a graph break hides which inputs there are."""
    if batch_dim is None or "" in inputs or not inputs:
        return None
    known = ", ".join(f"{name} with {rank} axes" for name, rank in inputs.items())
    if not isinstance(batch_dim, Mapping):
        if all(rank <= batch_dim for rank in inputs.values()):
            return f"batch_dim is {batch_dim}, and no input of the model has that axis; its inputs are: {known}"
        return None
    for name, axis in batch_dim.items():
        if axis is not None and inputs.get(name, 0) <= axis:
            return f"batch_dim: the model reads no input {name!r} with an axis {axis}; its inputs are: {known}"
    return None
