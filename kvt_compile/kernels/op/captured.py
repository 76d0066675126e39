"""Shapes of captured tensors -> nothing, or an error: checks the indices that a generated kernel does not clamp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import sympy
import torch

from kvt_compile.kernels.language.expressions import guarded_loads, plain_index
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec


def check_call(call: AttentionCall) -> None:
    """`check_captured` of a call; one without rows or keys reads nothing."""
    extents = dict(zip("bhij", (*call.rows, call.keys), strict=True))
    if call.captured and 0 not in extents.values():
        check_captured(call.spec, [c.shape for c in call.captured], extents)


def check_captured(spec: KernelSpec, shapes: Sequence[Sequence[int]], extents: dict[str, int]) -> None:
    """Raises ValueError when a coordinate that indexes a captured tensor (of the given shape) outside every where()
    leaves the tensor: such indices are not clamped in the kernel."""
    for slot, dim, name, value in unclamped(spec):
        if value < 0:
            raise ValueError(f"captured tensor {slot} is indexed by {value} in dimension {dim}: expected at least 0")
        needed = extents[name] if name else value + 1
        if not surely(shapes[slot][dim] >= needed):
            raise ValueError(
                f"captured tensor {slot} has size {shapes[slot][dim]} in dimension {dim}, "
                f"which is indexed by {name or value}: expected at least {needed}"
            )
    for slot, shape in enumerate(shapes):
        if not all(surely(size > 0) for size in shape):
            raise ValueError(f"captured tensor {slot} has no elements (shape {tuple(shape)})")


def surely(condition: bool | torch.SymBool) -> bool:
    """A comparison; of symbolic sizes whether it holds for all of them, with no guard that would narrow them."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


@lru_cache(maxsize=1024)
def unclamped(spec: KernelSpec) -> tuple[tuple[int, int, str, int], ...]:
    """(slot, dimension, coordinate or "", constant) of every index that a generated kernel does not clamp."""
    guarded = guarded_loads(spec.score_expression) | guarded_loads(spec.weight_expression)
    found = []
    for x in {*spec.score_loads, *spec.weight_loads} - guarded:
        for dim, index in enumerate(x.index):
            constant = isinstance(index, sympy.Integer)
            if constant or plain_index(index):
                found.append((x.slot, dim, "" if constant else str(index), int(index) if constant else 0))
    return tuple(sorted(found))
