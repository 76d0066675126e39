"""Which axes of an operation's output are axes of its input, for operations that are not pointwise.

linear over the last axis: every other axis passes        conv2d 1x1: batch and space pass, channels mix
"""

from __future__ import annotations

from collections.abc import Callable

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis
from kvt_compile.passes.canonical.values import Dim, Value

Inputs = list[tuple[Value, Coords]]

# op -> how many leading / which axes are mixed; everything else passes unchanged
_LAST = frozenset({"layer_norm", "rms_norm", "log_softmax", "cumsum", "softmax", "sort", "glu"})
_CHANNEL = frozenset({"conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm", "convolution"})
_UNIFORM = frozenset(
    {
        "gelu",
        "detach",
        "dropout",
        "setitem",
        "index_put",
        "index_fill",
        "nan_to_num",
        "roll",
        "flip",
        "softplus",
        "elu",
        "leaky_relu",
        "hardtanh",
        "normalize",
        "alpha_dropout",
        "mish",
        "hardswish",
    }
)
# rows chosen by index: every axis but theirs passes
_PICKS = frozenset({"gather", "index_select"})


def _picked(value: Value, rank: int) -> set[int]:
    call = value.attrs["call"]
    dim = axis(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None), rank)
    return set(range(rank)) if dim is None else {dim}


def _mix(space: Space, x: Value, out: Coords, dims: set[int]) -> Coords:
    """Input coordinates equal to the output's, but anywhere on the axes that are mixed."""
    return tuple(
        space.anywhere((x, dim), size) if dim in dims else coord
        for dim, (size, coord) in enumerate(zip(x.shape, out, strict=True))
    )


def passed_inputs(space: Space, value: Value, out: Coords) -> Inputs | None:
    """(input, its coordinates) for every tensor input whose axes can be followed, or None when none can."""
    if value.kind == "contraction":
        return _through_contraction(value, out, lambda label, size: space.anywhere((value, label), size))
    x = next(iter(value.operands), None)
    if x is None:
        return None
    if value.kind in ("reduce",):
        return _through_reduce(space, value, x, out)
    if len(x.shape) != len(value.shape):
        return None
    rank = len(x.shape)
    if value.kind == "softmax":
        return [(x, _mix(space, x, out, {value.attrs["dim"]}))]
    rules: list[tuple[frozenset[str], Callable[[], set[int]]]] = [
        (_LAST, lambda: {rank - 1}),
        (_CHANNEL, lambda: {1} if rank > 1 else set()),
        (_UNIFORM, lambda: set()),
        (_PICKS, lambda: _picked(value, rank)),
    ]
    for names, dims in rules:
        if value.name in names:
            mixed = dims()
            kept = [d for d in range(rank) if d not in mixed]
            if all(x.shape[d] == value.shape[d] for d in kept):
                return [(x, _mix(space, x, out, mixed))]
    return None


def _through_contraction(value: Value, out: Coords, summed: Callable[[object, Dim], Coord]) -> Inputs:
    at: dict[object, Coord] = dict(zip(value.attrs["out"], out, strict=True))
    inputs: Inputs = []
    for x, labels in zip(value.inputs, (value.attrs["lhs"], value.attrs["rhs"]), strict=True):
        coords: list[Coord] = []
        for label, size in zip(labels, x.shape, strict=True):
            if label is not None and label not in at:
                at[label] = summed(label, size)
            coords.append(Coord() if label is None else at[label])
        inputs.append((x, tuple(coords)))
    return inputs


def contraction_inputs(space: Space, value: Value, out: Coords) -> tuple[tuple[Value, Coords], tuple[Value, Coords]]:
    """Both operands of a contraction with their coordinates; summed labels get fresh ones."""
    left, right = _through_contraction(value, out, lambda label, size: space.fresh("d", size))
    return left, right


def _through_reduce(space: Space, value: Value, x: Value, out: Coords) -> Inputs:
    dims = value.attrs["dims"]
    rest = iter(c for d, c in enumerate(out) if not (value.attrs["keepdim"] and d in dims))
    anywhere = [space.anywhere((x, d), size) if d in dims else None for d, size in enumerate(x.shape)]
    return [(x, tuple(next(rest) if coord is None else coord for coord in anywhere))]
