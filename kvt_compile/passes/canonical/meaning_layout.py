"""Layout operations: the same elements at other coordinates.

Each name below makes a layout Value; `PULL` says where an element of its output comes from:

    output coordinates  --PULL[name]-->  input coordinates        (None: not expressible, so the value is a leaf)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvt_compile.passes.canonical.coords import ZERO, Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import Builder, axis, integer, meaning
from kvt_compile.passes.canonical.values import Dim, Value, as_dim, dim_of, meta_value, product, same

Pull = Callable[[Space, Value, Coords], Coords | None]


def _pull_permute(space: Space, x: Value, out: Coords) -> Coords | None:
    back: list[Coord] = [ZERO] * len(out)
    for position, dim in enumerate(x.attrs["dims"]):
        back[dim] = out[position]
    return tuple(back)


def _pull_reshape(space: Space, x: Value, out: Coords) -> Coords | None:
    return space.regroup(out, x.inputs[0].shape)


def _pull_expand(space: Space, x: Value, out: Coords) -> Coords | None:
    source = x.inputs[0].shape
    tail = out[len(out) - len(source) :]
    return tuple(ZERO if size == 1 else coord for size, coord in zip(source, tail, strict=True))


def _pull_slice(space: Space, x: Value, out: Coords) -> Coords | None:
    dim = x.attrs["dim"]
    moved = space.shifted(space.resolve(out[dim]), x.attrs["start"], x.attrs["step"])
    return None if moved is None else (*out[:dim], moved, *out[dim + 1 :])


def _pull_select(space: Space, x: Value, out: Coords) -> Coords | None:
    dim = x.attrs["dim"]
    return (*out[:dim], space.constant(x.inputs[0].shape[dim], x.attrs["index"]), *out[dim:])


def _pull_repeat_interleave(space: Space, x: Value, out: Coords) -> Coords | None:
    dim = x.attrs["dim"]
    parts = space.cut(out[dim], x.attrs["repeats"])
    return None if parts is None else (*out[:dim], parts[0], *out[dim + 1 :])


def _pull_repeat(space: Space, x: Value, out: Coords) -> Coords | None:
    source = x.inputs[0].shape
    back: list[Coord] = []
    for size, coord in zip(source, out[len(out) - len(source) :], strict=True):
        parts = (ZERO, ZERO) if size == 1 else space.cut(coord, size)
        if parts is None:
            return None
        back.append(parts[1])
    return tuple(back)


def _pull_taken(space: Space, x: Value, out: Coords) -> Coords | None:
    """Some dimensions of the result, in any order: those it has beside them repeat the same elements."""
    return tuple(out[d] for d in x.attrs["dims"])


PULL: dict[str, Pull] = {
    "permute": _pull_permute,
    "reshape": _pull_reshape,
    "expand": _pull_expand,
    "slice": _pull_slice,
    "select": _pull_select,
    "repeat_interleave": _pull_repeat_interleave,
    "repeat": _pull_repeat,
    "taken": _pull_taken,
}

REARRANGES = frozenset({"permute", "reshape", "expand", "repeat_interleave", "repeat", "taken"})
"""The layouts a rewrite may look through and build again from the tensor below: no element is cut away."""


# ---- spellings -----------------------------------------------------------------------------------------------------


def _flat(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """f(x, 1, 2) and f(x, (1, 2)) alike."""
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], list | tuple | torch.Size) else dims


def _permute(b: Builder, x: Value, dims: list[int]) -> Value:
    return b.layout("permute", x, tuple(x.shape[d] for d in dims), dims=tuple(dims))


@meaning("permute")
def _permute_call(b: Builder, input: Value, *dims: Any) -> Value | None:
    listed = [axis(d, len(input.shape)) for d in _flat(dims)]
    known = [d for d in listed if d is not None]
    return _permute(b, input, known) if len(known) == len(input.shape) else None


@meaning("transpose")
def _transpose(b: Builder, input: Value, dim0: Any, dim1: Any) -> Value | None:
    first, second = axis(dim0, len(input.shape)), axis(dim1, len(input.shape))
    if first is None or second is None:
        return None
    dims = list(range(len(input.shape)))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(b, input, dims)


@meaning("T", "t")
def _reverse(b: Builder, input: Value) -> Value | None:
    return _permute(b, input, list(reversed(range(len(input.shape)))))


@meaning("mT", "adjoint", "mH")
def _matrix_transpose(b: Builder, input: Value) -> Value | None:
    if input.dtype is None or input.dtype.is_complex or len(input.shape) < 2:
        return None
    return _transpose(b, input, -2, -1)


@meaning("movedim")
def _movedim(b: Builder, input: Value, source: Any, destination: Any) -> Value | None:
    rank = len(input.shape)
    froms = [axis(d, rank) for d in _flat((source,))]
    tos = [axis(d, rank) for d in _flat((destination,))]
    if None in froms or None in tos or len(froms) != len(tos):
        return None
    order: list[Any] = [None] * rank
    for source_dim, target in zip(froms, tos, strict=True):
        if target is not None:
            order[target] = source_dim
    rest = iter(d for d in range(rank) if d not in froms)
    return _permute(b, input, [next(rest) if d is None else d for d in order])


@meaning("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(b: Builder, input: Value, *sizes: Any, **ignored: Any) -> Value | None:
    """Any row-major regrouping: the sizes are read off the result, whatever the arguments were."""
    if sizes and isinstance(sizes[0], torch.dtype):
        return None
    return b.layout("reshape", input, b.shape) if same(product(input.shape), product(b.shape)) else None


@meaning("expand", "expand_as")
def _expand(b: Builder, input: Value, *sizes: Any, **ignored: Any) -> Value | None:
    return b.layout("expand", input, b.shape)


@meaning("repeat")
def _repeat(b: Builder, input: Value, *sizes: Any, **ignored: Any) -> Value | None:
    return b.layout("repeat", input, b.shape)


@meaning("repeat_interleave")
def _repeat_interleave(b: Builder, input: Value, repeats: Any, dim: Any = None, **ignored: Any) -> Value | None:
    count, where = integer(repeats), None if dim is None else axis(dim, len(input.shape))
    if count is None or where is None:
        return None
    return b.layout("repeat_interleave", input, b.shape, dim=where, repeats=count)


def slice_of(b: Builder, x: Value, dim: int, start: int, size: Dim, step: int = 1) -> Value:
    if start == 0 and step == 1 and same(size, x.shape[dim]):
        return x
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    return b.layout("slice", x, shape, dim=dim, start=start, step=step)


@meaning("narrow")
def _narrow(b: Builder, input: Value, dim: Any, start: Any, length: Any) -> Value | None:
    where, first = axis(dim, len(input.shape)), integer(start)
    if where is None or first is None or first < 0:
        return None
    return slice_of(b, input, where, first, b.shape[where])


@meaning("slice")
def _slice(b: Builder, input: Value, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Value | None:
    where = axis(dim, len(input.shape))
    return None if where is None else _one_slice(b, input, where, slice(start, end, step))


@meaning("select")
def _select(b: Builder, input: Value, dim: Any, index: Any) -> Value | None:
    where = axis(dim, len(input.shape))
    return None if where is None else select_of(b, input, where, index)


def select_of(b: Builder, x: Value, dim: int, index: Any) -> Value | None:
    number, size = integer(index), x.shape[dim]
    if number is None or (number < 0 and not isinstance(size, int)):
        return None
    number = number + int(size) if number < 0 else number
    return b.layout("select", x, (*x.shape[:dim], *x.shape[dim + 1 :]), dim=dim, index=number)


_END = (1 << 63) - 1
"""What ATen's slice has for no end."""


def _one_slice(b: Builder, x: Value, dim: int, part: slice) -> Value | None:
    size = x.shape[dim]
    if isinstance(part.stop, int) and part.stop >= _END:
        part = slice(part.start, None, part.step)
    step = 1 if part.step is None else integer(part.step)
    start = 0 if part.start is None else integer(part.start)
    stop: Dim | None = size if part.stop is None else integer(part.stop)
    if step is None or step < 1 or start is None:
        return None
    if part.stop is not None and stop is None:  # a dynamic bound: fine when it provably is the whole dimension
        bound = part.stop
        known = meta_value(bound) if isinstance(bound, fx.Node) else bound
        if isinstance(known, torch.SymInt) and start == 0 and step == 1 and same(dim_of(known), size):
            return x
        return None
    assert stop is not None
    if not isinstance(size, int):
        if start < 0 or (part.stop is not None and (not isinstance(stop, int) or stop >= 0)):
            return None
        stop = size if part.stop is None else as_dim(size + stop)  # x[a:-b]
        return slice_of(b, x, dim, start, as_dim(stop - start), step) if step == 1 else None
    start, stop, step = slice(start, int(stop), step).indices(size)
    return slice_of(b, x, dim, start, len(range(start, stop, step)), step)


def index(b: Builder, x: Value, items: Any) -> Value | None:
    """x[items] for None, ints, slices and `...`; None when a tensor indexes (a gather)."""
    listed = list(items) if isinstance(items, tuple) else [items]
    if any(not (item is None or item is Ellipsis or isinstance(item, slice | int | fx.Node)) for item in listed):
        return None
    if any(isinstance(item, bool) for item in listed):
        return None
    used = sum(1 for item in listed if item is not None and item is not Ellipsis)
    if Ellipsis in listed:
        at = listed.index(Ellipsis)
        listed[at : at + 1] = [slice(None)] * (len(x.shape) - used)
    dim = 0
    current: Value | None = x
    for item in listed:
        if current is None:
            return None
        if item is None:
            current = b.layout("reshape", current, (*current.shape[:dim], 1, *current.shape[dim:]))
            dim += 1
        elif isinstance(item, slice):
            current = _one_slice(b, current, dim, item)
            dim += 1
        else:
            current = select_of(b, current, dim, item)
    return current


# ---- elements of several tensors -----------------------------------------------------------------------------------


@meaning("cat")
def _cat(b: Builder, tensors: Any, dim: Any = 0) -> Value | None:
    if not isinstance(tensors, list | tuple) or not all(isinstance(x, Value) for x in tensors):
        return None
    where = axis(dim, len(b.shape))
    if where is None or any(len(x.shape) != len(b.shape) for x in tensors):
        return None
    return b.value("select_by", "cat", tuple(tensors), dim=where)


@meaning("stack")
def _stack(b: Builder, tensors: Any, dim: Any = 0) -> Value | None:
    """Each tensor with a dimension of size 1, one behind the other."""
    where = axis(dim, len(b.shape))
    if where is None or not isinstance(tensors, list | tuple) or not all(isinstance(x, Value) for x in tensors):
        return None
    shape = (*b.shape[:where], 1, *b.shape[where + 1 :])
    return _cat(b, [b.layout("reshape", x, shape) for x in tensors], where)
