"""Operations whose numbers are not read, but whose axes are known: which axes of the result an input's axis became.

    conv2d      [B, C, H, W] -> [B, C', H', W']     each axis is the one at its place, of another size
    stack       [N, C] -> [N, 2, C]                 the new axis is none of the input's
    im2col      [B, C, H, W] -> [B, C*9, L]         H and W became L

What has no line here, is not pointwise by torch's own word and does not keep its shape is not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from kvt_compile.passes.canonical.coords import Atom, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis
from kvt_compile.passes.canonical.spellings import DTENSOR_CALLS, Call
from kvt_compile.passes.canonical.values import Value, meta_value, same, same_shape

Became = list[set[int]]
"""For every axis of the input, the axes of the result that it became."""

_SAME = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d"),
        *("max_pool1d_with_indices", "max_pool2d_with_indices", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "_adaptive_avg_pool2d"),
        *("interpolate", "upsample", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sample", "grid_sampler"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad", "constant_pad_nd", "reflection_pad2d"),
        *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm"),
        *("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "instance_norm"),
        *("local_response_norm", "normalize", "glu", "log_softmax", "_log_softmax", "softmax", "softmin", "_softmax"),
        *("sort", "argsort", "topk", "kthvalue", "gather", "index_select", "take_along_dim", "scatter", "scatter_add"),
        *("index_add", "index_copy", "index_fill", "index_put", "masked_scatter", "setitem", "put", "cat", "roll"),
        *("flip", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "tril", "triu", "detach", "dropout"),
        *("dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
        *("gumbel_softmax", "prelu", "rrelu", "to", "type", "float", "half", "bfloat16", "double", "type_as", "clone"),
        *DTENSOR_CALLS,  # a rank's part has the same axes
        *("identity", "checkpoint", "narrow", "slice", "select_scatter", "slice_scatter", "diagonal_scatter", "diff"),
        *(
            "split",
            "chunk",
            "tensor_split",
            "hsplit",
            "vsplit",
            "dsplit",
            "linear",
            "renorm",
            "nan_to_num",
            "gelu",
            "mish",
            "hardswish",
            "leaky_relu",
            "elu",
            "softplus",
            "hardtanh",
        ),
    }
)
"""Every axis of the first input is the one at its place."""


def _at_their_places(value: Value, call: Call, x: Value) -> Became | None:
    return [{d} for d in range(len(x.shape))] if len(x.shape) == len(value.shape) else None


def _leading(value: Value, call: Call, x: Value) -> Became | None:
    return [{d} if d < len(value.shape) else set() for d in range(len(x.shape))]


def _stacked(value: Value, call: Call, x: Value) -> Became | None:
    new = axis(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0), len(value.shape))
    return None if new is None else [{d if d < new else d + 1} for d in range(len(x.shape))]


def _unbound(value: Value, call: Call, x: Value) -> Became | None:
    gone = axis(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0), len(x.shape))
    return None if gone is None else [set() if d == gone else {d - (d > gone)} for d in range(len(x.shape))]


def _unfolded(value: Value, call: Call, x: Value) -> Became | None:
    """`x.unfold(dim, size, step)`: windows of an axis, their insides last; `F.unfold`: columns of a map, whose insides
    stand within the channels (`_inside_of_columns` makes them an axis of their own, the fourth)."""
    if len(value.shape) == len(x.shape) + 1:
        dim = axis(call.kwargs.get("dimension", call.args[1] if len(call.args) > 1 else None), len(x.shape))
        return [{d, len(x.shape)} if d == dim else {d} for d in range(len(x.shape))] if dim is not None else None
    return [{0}, {1}, {2, 3}, {2, 3}] if _makes_columns(value, x) else None


def _makes_columns(value: Value, x: Value) -> bool:
    return (len(x.shape), len(value.shape)) == (4, 3)


def _inside_of_columns(space: Space, value: Value, x: Value, coords: Coords, wanted: set[Atom]) -> Coords | None:
    """[B, C*kernel, L] -> [B, C, L, kernel]"""
    parts = space.cut(coords[1], value.shape[1] // x.shape[1])
    if parts is None:
        return None
    now = space.resolve(Coord(tuple(wanted))).digits  # what was wanted may just have been cut
    wanted.clear()
    wanted.update(now)
    return coords[0], parts[0], coords[2], parts[1]


def _folded(value: Value, call: Call, x: Value) -> Became | None:
    return [{0}, {1}, {2, 3}] if (len(x.shape), len(value.shape)) == (3, 4) else None


def _indexed(value: Value, call: Call, x: Value) -> Became | None:
    """x[:, rows], x[mask]: one tensor of positions in the place of an axis (a mask: of as many as it has)."""
    items = call.args[1] if len(call.args) > 1 else None
    listed = [slice(None) if item is None and call.name == "index" else item for item in _items(items)]
    found: Became = []
    out = 0
    used = sum(_taken(item) for item in listed)
    for item in listed:
        fake = meta_value(item) if isinstance(item, torch.fx.Node) else item
        if item is Ellipsis:
            for _ in range(len(x.shape) - used):
                found.append({out})
                out += 1
        elif item is None:
            out += 1
        elif isinstance(item, slice):
            found.append({out})
            out += 1
        elif isinstance(fake, torch.Tensor):
            if sum(isinstance(other, torch.fx.Node) for other in listed) > 1:
                return None  # positions that broadcast together
            rank = 1 if fake.dtype is torch.bool else fake.dim()
            found += [set(range(out, out + rank))] * _taken(item)
            out += rank
        else:
            found.append(set())
    rest = len(x.shape) - len(found)
    found += [{out + d} for d in range(rest)]
    return found if rest >= 0 and out + rest == len(value.shape) else None


def _items(items: Any) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else [items]


def _taken(item: Any) -> int:
    """How many axes of the input an index takes."""
    fake = meta_value(item) if isinstance(item, torch.fx.Node) else item
    if isinstance(fake, torch.Tensor) and fake.dtype is torch.bool:
        return fake.dim()
    return 0 if item is None or item is Ellipsis else 1


_BECAME: dict[str, Callable[[Value, Call, Value], Became | None]] = {
    **dict.fromkeys(_SAME, _at_their_places),
    **dict.fromkeys(("view_as_real", "view_as_complex", "embedding", "one_hot"), _leading),
    "stack": _stacked,
    "unbind": _unbound,
    "unfold": _unfolded,
    "im2col": _unfolded,
    "fold": _folded,
    "col2im": _folded,
    "getitem": _indexed,
    "index": _indexed,
}


def behind(
    space: Space, value: Value, coords: Coords, wanted: set[Atom], of: Value | None = None
) -> tuple[Value, Coords] | None:
    """(input, its coordinates) that the wanted axes of an operation come from; None where that is not known.

    Where an axis has another size behind it, the whole of that one is wanted (`wanted` grows).
    of: which one of several parts, in place of the first that was computed.
    """
    call, inputs = value.attrs.get("call"), list(value.operands)
    if value.kind == "select_by":
        call = Call("put" if value.name == "put" else "cat", (), {})
    if value.name == "getitem" and inputs and inputs[0].kind == "opaque" and not inputs[0].shape:
        call, inputs = inputs[0].attrs.get("call"), list(inputs[0].operands)  # one of several results
    if not isinstance(call, Call) or not inputs:
        return None
    x = of or _the_one(call.name, inputs)
    became = _BECAME.get(call.name, _at_their_places if is_pointwise(call.name) else None)
    found = became(value, call, x) if became is not None else None
    if found is None:
        return None
    if call.name in ("unfold", "im2col") and _makes_columns(value, x):
        columns = _inside_of_columns(space, value, x, coords, wanted)
        if columns is None:
            return None
        coords = columns
    return x, tuple(_coordinates(space, x, found, coords, wanted))


def _the_one(name: str, inputs: list[Value]) -> Value:
    """The input whose axes the result has: positions of an embedding, the largest of several parts, else the first."""
    if name == "embedding":
        return next((x for x in inputs if x.dtype is not None and not x.dtype.is_floating_point), inputs[0])
    if name in ("cat", "stack"):
        return next((x for x in inputs if x.kind != "source"), inputs[0])
    if is_pointwise(name):
        return max(inputs, key=lambda x: len(x.shape))
    return inputs[0]


def _coordinates(space: Space, x: Value, became: Became, coords: Coords, wanted: set[Atom]) -> Iterator[Coord]:
    for size, axes in zip(x.shape, became, strict=True):
        here = [coords[d] for d in sorted(axes)]
        if len(here) == 1 and (size == 1 or space.covers(here[0], size)):
            yield here[0] if size != 1 else Coord()
            continue
        whole = space.fresh("whole", size)
        if any(wanted & set(space.resolve(c).digits) for c in here):
            wanted.update(whole.digits)
        yield whole


@lru_cache(maxsize=512)
def is_pointwise(name: str) -> bool:
    """Whether torch itself says so of its own operation of this name."""
    return _tagged(name) or _tagged(f"{name}_")


def _tagged(name: str) -> bool:
    packet: Any = getattr(torch.ops.aten, name, None)
    names = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in names)


def kept_by_shape(value: Value, here: set[int]) -> Value | None:
    """The input of an operation that is not understood whose axes the result has, as a rule.

    It has the same shape, the wanted axes are told from the others by their sizes, and they are none that a layer would
    have made (the last one, and axis 1 of a map).
    """
    rank = len(value.shape)
    features = {rank - 1} | ({1} if rank > 3 else set())
    others = set(range(1, rank)) - here
    if here & features or any(same(value.shape[d], value.shape[e]) for d in here for e in others):
        return None
    inputs = (y for x in value.operands for y in (x.operands if x.kind == "opaque" and not x.shape else (x,)))
    return next((x for x in inputs if same_shape(x.shape, value.shape)), None)
