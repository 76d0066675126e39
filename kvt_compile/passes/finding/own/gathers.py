"""What was taken from a tensor at the positions of its top keys -> which tensor, which positions, and all of it.

    v.unsqueeze(2).expand(..).gather(3, index[..., None].expand(..))        v[arange(B)[:, None, None], index]

Either is, at [.., m, d], the element of v at [.., j, d] for the m-th position j; "widened" it is that for every j.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import axis, integer
from kvt_compile.passes.canonical.meaning_layout import PULL
from kvt_compile.passes.canonical.spellings import Call
from kvt_compile.passes.canonical.values import Dim, Value, same
from kvt_compile.passes.finding.own.ranking import Kept, argument, largest_at, pulled
from kvt_compile.passes.finding.own.steps import Step, followed, make_wide
from kvt_compile.passes.finding.own.unread import Unread
from kvt_compile.passes.reading.read import aligned


@dataclass(frozen=True)
class Gather:
    """Elements of `base`: dimension d of it is dimension `dims[d]` of the result, read at the positions `index` holds
    where that is `where`."""

    value: Value
    base: Value
    index: Value
    where: int
    dims: tuple[int, ...]
    coords: Coords
    """Coordinates of the result."""
    at: Coords
    """Coordinates of the index."""
    way: tuple[Step, ...]
    """What rearranges the result, with the dimension of the top keys."""

    @property
    def keys(self) -> Dim:
        return self.base.shape[self.dims.index(self.where)]

    def kept(self, space: Space, which: Coord, along: Coord) -> Kept | None:
        """Which elements of a ranking stand where it reads."""
        return largest_at(space, self.index, self.at, which, along)

    def below(self, along: Coord) -> Coords:
        """Where the base is read for the key `along` counts."""
        return tuple(along if d == self.where else self.coords[d] for d in self.dims)

    def widen(self) -> set[Value]:
        """Makes it all of the base, for every key; the values that changed."""
        keys, value = self.keys, self.value
        value.kind, value.name, value.inputs = "layout", "taken", (self.base,)
        value.attrs = {"dims": self.dims}
        for step in (Step(value, self.where), *self.way):
            make_wide(step, keys)
        return {value, *(step.value for step in self.way)}


def gather_of(space: Space, value: Value, dim: int, coords: Coords) -> Gather:
    """The gather a value is, below rearrangements; its dimension `dim` counts the top keys.  Raises Unread."""
    way: list[Step] = []
    while value.name != "taken" and (
        value.kind == "layout" or (value.kind == "pointwise" and value.name == "identity")
    ):
        if len(value.users) != 1:
            raise Unread("the values of the top keys are read at several places")
        way.append(Step(value, dim))
        if value.kind == "layout":
            below, inner = PULL[value.name](space, value, coords), followed(value, dim)
            if below is None or inner is None:
                break
            coords, dim = below, inner
        value = value.inputs[0]
    coords = space.resolve_all(coords)
    found: Gather | None = None
    if value.kind == "opaque" and isinstance(value.attrs.get("call"), Call) and len(value.users) == 1:
        if value.name in ("gather", "take_along_dim"):
            found = _gathered(value, dim, coords, tuple(way))
        elif value.name in ("getitem", "index"):
            found = _indexed(space, value, dim, coords, tuple(way))
    if found is None:
        raise Unread("what the weights of the top keys are multiplied with is not gathered in a way that is understood")
    return found


def _gathered(gather: Value, dim: int, coords: Coords, way: tuple[Step, ...]) -> Gather | None:
    by_name = gather.name == "take_along_dim"
    base = argument(gather, "input", 0)
    index = argument(gather, "indices", 1) if by_name else argument(gather, "index", 2)
    where = axis(argument(gather, "dim", 2 if by_name else 1), len(gather.shape))
    if not isinstance(base, Value) or not isinstance(index, Value) or where is None:
        return None
    if not len(base.shape) == len(index.shape) == len(gather.shape) or not all(map(same, index.shape, gather.shape)):
        return None
    sizes = zip(base.shape, gather.shape, strict=True)
    if where != dim or not all(same(x, y) for d, (x, y) in enumerate(sizes) if d != where):
        raise Unread("what the weights of the top keys are multiplied with is not gathered along the keys alone")
    return Gather(gather, base, index, where, tuple(range(len(base.shape))), coords, coords, way)


def _indexed(space: Space, value: Value, dim: int, coords: Coords, way: tuple[Step, ...]) -> Gather | None:
    """base[t0, t1, ...]: all of the tensors count off an axis of the result but one, which holds the positions."""
    base, items = argument(value, "input", 0), _tensors(value)
    if not isinstance(base, Value) or items is None or not items:
        return None
    rank = len(value.shape) - (len(base.shape) - len(items))
    dims: list[int] = []
    index: Value | None = None
    for size, item in zip(base.shape, items, strict=False):
        counted = _counted(space, item, aligned(coords[:rank], item), size)
        at = None if counted is None else next((d for d in range(rank) if space.resolve(coords[d]) == counted), None)
        if at is None and index is not None:
            return None
        if at is None:
            index = item
        dims.append(dim if at is None else at)
    if index is None or dim >= rank or len(set(dims)) != len(dims):
        return None
    dims += range(rank, len(value.shape))
    return Gather(value, base, index, dim, tuple(dims), coords, aligned(coords[:rank], index), way)


def _tensors(value: Value) -> list[Value] | None:
    """The tensors of positions in an index, from the first axis on; whole axes may follow."""
    call: Call = value.attrs["call"]
    listed = call.args[1] if len(call.args) > 1 else None
    if not isinstance(listed, list | tuple):
        return None
    given = [value.attrs["given"].get(item) if isinstance(item, fx.Node) else item for item in listed]
    while given and (given[-1] in (slice(None), Ellipsis) or (given[-1] is None and value.name == "index")):
        given.pop()
    tensors = [item for item in given if isinstance(item, Value)]
    whole = all(x.dtype is not None and not x.dtype.is_floating_point for x in tensors)
    return tensors if len(tensors) == len(given) and whole and not any(map(_is_mask, tensors)) else None


def _is_mask(x: Value) -> bool:
    return str(x.dtype) in ("torch.bool", "torch.uint8")


def _counted(space: Space, item: Value, coords: Coords, size: Dim) -> Coord | None:
    """The coordinate whose count a value holds, where it is arange(size) laid out along it."""
    value, at = pulled(space, item, coords)
    call = value.attrs.get("call")
    if value.kind != "opaque" or value.name != "arange" or not isinstance(call, Call) or len(at) != 1:
        return None
    start = integer(call.kwargs.get("start", call.args[0] if len(call.args) > 1 else 0))
    step = integer(call.kwargs.get("step", call.args[2] if len(call.args) > 2 else 1))
    return at[0] if (start, step) == (0, 1) and same(value.shape[0], size) and space.covers(at[0], size) else None
