"""Where the tokens of a site stand: its token axis followed back to the grid it was made of.

    conv -> (B, C, H, W) -> flatten -> (B, H*W, C) -> cat((cls, x)) -> ... -> q      ->      Geometry((H, W), prefix=1)
    (B, H/7, 7, W/7, 7, C) -> permute, reshape -> (B*windows, 49, C) -> ... -> q     ->      Geometry((7, 7))

The axis is followed through what keeps tokens where they are.  A concatenation of a few tokens before the others is the
prefix.  Where it leads to anything else nothing is said: a guess would move every window.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvt_compile.passes.canonical.coords import Atom, Coord, Coords, Space
from kvt_compile.passes.canonical.spellings import Call
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.reading.axes import behind
from kvt_compile.passes.reading.provenance import makes_channels, step_back
from kvt_compile.passes.reading.read import aligned
from kvt_compile.passes.site import Fused, Plan
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import AXES

_MOVES = frozenset(
    {
        *("sort", "argsort", "topk", "kthvalue", "gather", "index_select", "take_along_dim", "scatter"),
        *("scatter_add", "index_add", "index_copy", "index_fill", "index_put", "index", "getitem"),
        *("masked_scatter", "setitem", "put", "roll", "flip", "select_scatter", "slice_scatter"),
        *("diagonal_scatter", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "renorm", "cat"),
        *("stack", "fold", "unfold", "im2col", "col2im", "embedding", "pad"),
    }
)
"""Operations that are followed elsewhere because an axis stays an axis, but whose elements do not keep their places."""
_LIMIT = 2000
"""Steps back: some twenty a block of a model."""


@dataclass(frozen=True)
class Placed:
    """Where tokens stand, by the tensor whose dimensions are the grid: sizes that are known only at run time too."""

    prefix: int
    value: Value
    dims: tuple[int, ...]

    @property
    def geometry(self) -> Geometry | None:
        """None where a size is known only at run time."""
        grid = tuple(self.value.shape[d] for d in self.dims)
        sizes = tuple(int(size) for size in grid if isinstance(size, int))
        return Geometry(sizes, self.prefix) if len(sizes) == len(grid) else None

    def __str__(self) -> str:
        grid = "x".join(str(self.value.shape[d]) for d in self.dims)
        return f"{grid} + {self.prefix}" if self.prefix else grid


def grid_of(plan: Plan) -> Placed | None:
    """How the queries of a site are laid out, where queries and keys are the same tokens and the graph says so."""
    if not isinstance(plan, Fused):
        return None
    of_queries = _grid(plan.q.value, plan.q.coords, plan.groups.queries)
    of_keys = _grid(plan.k.value, plan.k.coords, plan.groups.keys)
    return of_queries if of_queries == of_keys else None


def _grid(value: Value, coords: Coords, axis: tuple[Atom, ...]) -> Placed | None:
    space, tokens, prefix = Space(), Coord(axis), 0
    for _ in range(_LIMIT):
        coords, tokens = space.resolve_all(coords), space.resolve(tokens)
        wanted = set(tokens.digits)
        here = [d for d, c in enumerate(coords) if wanted & set(c.digits)]
        if not here or not wanted <= {a for d in here for a in coords[d].digits}:
            return None
        if len(here) > 1:
            return _found(space, value, coords, tokens, here, prefix)
        dim = here[0]
        if value.kind == "pointwise":
            inputs = [(x, space.resolve_all(aligned(coords, x))) for x in value.operands if x.kind != "source"]
            whole = [(x, c) for x, c in inputs if wanted <= {a for y in c for a in y.digits}]
            if not whole:
                return None
            value, coords = min(whole, key=lambda item: item[0].index)  # the residual stream, not what was added to it
            continue
        if value.kind == "select_by" and value.name == "cat" and value.attrs["dim"] == dim:
            parts = list(value.operands)
            last = parts[-1]
            sizes = [x.shape[dim] for x in parts]
            if set(coords[dim].digits) != wanted or not space.covers(coords[dim], value.shape[dim]):
                return None
            if last.kind == "source" or not all(isinstance(size, int) for size in sizes[:-1]):
                return None
            prefix += sum(int(size) for size in sizes[:-1])
            tokens = space.fresh("tokens", sizes[-1])
            value, coords = last, (*coords[:dim], tokens, *coords[dim + 1 :])
            continue
        if value.kind == "contraction" and (not value.attrs["mixing"] or makes_channels(value, set(here))):
            return None
        call = value.attrs.get("call")
        if value.kind in ("opaque", "select_by") and (not isinstance(call, Call) or call.name in _MOVES):
            return None
        grown = set(wanted)
        # of an operation that is not understood nothing is guessed by its shape
        back = behind(space, value, coords, grown) if value.kind == "opaque" else None
        back = step_back(space, value, coords, grown, set(here)) if value.kind != "opaque" else back
        if back is None or set(space.resolve(Coord(tuple(grown))).digits) != set(space.resolve(tokens).digits):
            return None  # an axis of another size
        value, coords = back
    return None


def _found(space: Space, value: Value, coords: Coords, tokens: Coord, here: list[int], prefix: int) -> Placed | None:
    """Several dimensions that are the token axis together, each as a whole and nothing else."""
    if not all(set(coords[d].digits) <= set(tokens.digits) for d in here):
        return None  # a dimension that runs over more than tokens: rows of images one below the other
    order = sorted(here, key=lambda d: tokens.digits.index(coords[d].digits[0]) if coords[d].digits else -1)
    digits = tuple(a for d in order for a in coords[d].digits)
    sizes = [value.shape[d] for d in order]
    if digits != tokens.digits or not 2 <= len(sizes) <= AXES:
        return None
    if not all(space.covers(coords[d], value.shape[d]) for d in order):
        return None
    return Placed(prefix, value, tuple(order)) if value.holder is not None else None
