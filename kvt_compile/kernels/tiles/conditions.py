"""What tensors choose, joined with anything -> a condition of the score over small tables.

    keys(8) | window(3)   ->   where(keys[b, h, j] or low[0, i] <= at[0, j] <= high[0, i] and ..., score, -oo)

Every lowering computes conditions and tables that are captured, and a map of all pairs is never made: a table has a row
for each token or region.  Which tiles need not be computed at all is another matter (`touched.py`), decided by the same
tables, and never decides what is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.captured import check_call
from kvt_compile.kernels.op.selection import Selection
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SpecError
from kvt_compile.kernels.tiles.placed import placed, stays
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.maps import group, prefix_of, reach, region, region_counts
from kvt_compile.select.text import parse
from kvt_compile.select.values import (
    AXES,
    BY_CONTENT,
    Both,
    Either,
    Halo,
    Heads,
    Keys,
    Prefix,
    Regions,
    Selector,
    Shifted,
    Sinks,
    Window,
    by_content,
    leaves,
    routed,
    split,
)

FAR = 2**31 - 1
"""A place beyond every axis."""


@dataclass(frozen=True)
class Table:
    """One table of a selector: its name, and what a spec says of a captured tensor."""

    of: Selector
    name: str
    dtype: str
    ndim: int


_NEEDED: dict[type[Selector], tuple[tuple[str, str, int], ...]] = {
    Window: (
        ("low", "int32", 2), ("high", "int32", 2), ("at", "int32", 2),
        ("residue of queries", "int32", 1), ("residue of keys", "int32", 1),
    ),
    Halo: (("low", "int32", 2), ("high", "int32", 2), ("at", "int32", 2)),
    Shifted: (("group of queries", "int32", 2), ("group of keys", "int32", 2)),
    Regions: (("chosen", "bool", 4), ("region of queries", "int32", 1), ("region of keys", "int32", 1)),
    Prefix: (("queries", "bool", 1), ("keys", "bool", 1)),
    Keys: (("chosen", "bool", 3),),
    Heads: (("chosen", "bool", 3),),
    Sinks: (),
}  # fmt: skip
"""Tables of `[3, tokens]` (low, high, at) have a row for each axis, those that a grid does not have filled up."""


@lru_cache(maxsize=1024)
def condition(x: Selector) -> tuple[str, tuple[Table, ...]]:
    """Which keys a selection allows, in the score language, `{n}` being the n-th table."""
    needed = tuple(Table(leaf, *what) for leaf in dict.fromkeys(leaves(x)) for what in _NEEDED[type(leaf)])
    numbers = {(table.of, table.name): f"{{{n}}}" for n, table in enumerate(needed)}
    return _text(x, numbers), needed


def _text(x: Selector, numbers: Mapping[tuple[Selector, str], str]) -> str:
    if isinstance(x, Both | Either):
        texts = [_text(part, numbers) for part in x.parts]
        return _joined("logical_and" if isinstance(x, Both) else "logical_or", texts)
    if isinstance(x, Sinks):
        return f"lt(j, {x.n})"
    table = {name: number for (of, name), number in numbers.items() if of == x}
    if isinstance(x, Prefix):
        return f"logical_or({table['queries']}[i], {table['keys']}[j])"
    if isinstance(x, Keys | Heads):
        return f"{table['chosen']}[b, h, {'j' if isinstance(x, Keys) else 'i'}]"
    if isinstance(x, Regions):
        return f"{table['chosen']}[b, h, {table['region of queries']}[i], {table['region of keys']}[j]]"
    if isinstance(x, Shifted):
        return f"eq({table['group of queries']}[h, i], {table['group of keys']}[h, j])"
    assert isinstance(x, Window | Halo)
    low, high, at = table["low"], table["high"], table["at"]
    texts = [f"le({low}[{n}, i], {at}[{n}, j])" for n in range(AXES)]
    texts += [f"le({at}[{n}, j], {high}[{n}, i])" for n in range(AXES)]
    if isinstance(x, Window):
        texts.append(f"eq({table['residue of queries']}[i], {table['residue of keys']}[j])")
    return _joined("logical_and", texts)


def _joined(function: str, texts: list[str]) -> str:
    """Halves of halves, as brackets may not be deep."""
    if len(texts) == 1:
        return texts[0]
    half = len(texts) // 2
    return f"{function}({_joined(function, texts[:half])}, {_joined(function, texts[half:])})"


# ---- of a spec, and of a call ----------------------------------------------------------------------------------------


def conditioned(spec: KernelSpec) -> KernelSpec:
    """The spec whose kernels have the condition of its selection in their score; itself where lists say it all.

    Raises SpecError or ScoreSyntaxError where the text would be too long."""
    return _conditioned(spec) if by_tables(spec.select) and not spec.tables else spec


@lru_cache(maxsize=4096)
def _conditioned(spec: KernelSpec) -> KernelSpec:
    allowed, _ = split(parse(spec.select))
    assert allowed is not None
    text, needed = condition(allowed)
    holds = text.format(*(f"c{len(spec.captured) + n}" for n in range(len(needed))))
    return dataclasses.replace(
        spec,
        score=f"where({holds}, {spec.score}, -oo)",
        captured=(*spec.captured, *(CapturedSpec(table.dtype, table.ndim) for table in needed)),
        needs_grad=(*spec.needs_grad, *(False for _ in needed)) if spec.needs_grad else (),
        tables=len(needed),
    )


def check_conditioned(spec: KernelSpec) -> None:
    """Raises SpecError where the score of a spec that code is to be generated for lacks its condition."""
    if by_tables(spec.select) and not spec.tables:
        raise SpecError(f"the score of {spec.select} has no condition: code is generated for conditioned(spec)")


def by_tables(select: str) -> bool:
    """Whether tensors choose in a way that lists of tiles alone do not say."""
    return bool(select) and _by_tables(select)  # a call without a selection is not to wait for a look-up


@lru_cache(maxsize=1024)
def _by_tables(select: str) -> bool:
    allowed, _ = split(parse(select))
    return allowed is not None and needs_tables(allowed)


def needs_tables(x: Selector) -> bool:
    """Whether they choose in a way that lists of tiles alone do not say."""
    return by_content(x) and routed(x) is None


def with_tables(call: AttentionCall) -> AttentionCall:
    """The call of the spec that `conditioned` gives, its tables the last of its captured tensors."""
    spec = conditioned(call.spec)
    if spec is call.spec:
        return call
    check_call(call)  # within a where(), indices are clamped and no longer checked
    assert call.selection is not None
    found = Tables(call.selection, call.q, call.k)
    return dataclasses.replace(call, spec=spec, captured=[*call.captured, *found.in_order()])


def tables_of(call: AttentionCall) -> Sequence[Tensor]:
    """What `with_tables` added to a call."""
    return call.captured[len(call.captured) - call.spec.tables :]


class Tables:
    """What the condition of a selection reads: q `[B, Hq, Nq, D]`, k `[B, Hk, Nk, D]`; known: what `in_order` gave for
    the same tensors before, or nothing."""

    def __init__(self, selection: Selection, q: Tensor, k: Tensor, known: Sequence[Tensor] = ()) -> None:
        assert selection.allowed is not None
        self.allowed, self.geometry = selection.allowed, selection.geometry
        self.batch, self.heads, self.queries = q.shape[:3]
        self.kv_heads, self.keys = k.shape[1:3]
        self.device = q.device
        self.of: dict[Selector, dict[str, Tensor]] = {}
        if not known:
            self._find(selection, q, k)
        for table, tensor in zip(condition(self.allowed)[1], known, strict=bool(known)):
            self.of.setdefault(table.of, {})[table.name] = tensor

    def _find(self, selection: Selection, q: Tensor, k: Tensor) -> None:
        sizes = self.heads, self.queries, self.keys
        chosen = selection.tables(q, k)
        for leaf in dict.fromkeys(leaves(self.allowed)):
            names = [name for name, *_ in _NEEDED[type(leaf)] if name != "chosen"]
            known: dict[str, Tensor] = {}
            if names:
                static = _static(leaf, self.geometry, *sizes, self.device)
                stays(static, self.device)
                known = dict(zip(names, static, strict=True))
            if isinstance(leaf, BY_CONTENT):
                table = chosen[leaf]
                # tokens before the grid are of a last region, which chooses none and is never chosen
                known["chosen"] = functional.pad(table, (0, 1, 0, 1)) if isinstance(leaf, Regions) else table
            self.of[leaf] = known

    def in_order(self) -> list[Tensor]:
        """As `condition` numbers them."""
        return [self.of[table.of][table.name] for table in condition(self.allowed)[1]]


@lru_cache(maxsize=256)
def _static(
    x: Selector, geometry: Geometry, heads: int, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The tables that geometry decides, in the order of `_NEEDED`."""
    return placed(lambda: _tables(x, geometry, heads, queries, keys), device)


def _tables(x: Selector, geometry: Geometry, heads: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    i, j = torch.arange(queries), torch.arange(keys)
    if isinstance(x, Prefix):
        n = prefix_of(x, geometry)
        return i < n, j < n
    query_on, key_on = i >= geometry.prefix, j >= geometry.prefix
    if isinstance(x, Regions):
        none = 1
        for count in region_counts(x, geometry):
            none *= count
        return tuple(torch.where(on, region(x, geometry, y), none).int() for on, y in ((query_on, i), (key_on, j)))
    if isinstance(x, Shifted):
        head = torch.arange(heads)[:, None]
        mine, theirs = (group(x, geometry, head, heads, y) for y in (i, j))
        return torch.where(query_on, mine, -1).int(), torch.where(key_on, theirs, -2).int()
    assert isinstance(x, Window | Halo)
    low, high, at = (torch.zeros(AXES, n, dtype=torch.int32) for n in (queries, queries, keys))
    residues = [torch.zeros(n, dtype=torch.int64) for n in (queries, keys)]
    for axis, (query, key) in enumerate(zip(geometry.coordinates(i), geometry.coordinates(j), strict=True)):
        (first, last), step = reach(x, geometry.grid, axis, query)
        low[axis], high[axis], at[axis] = first.clamp(min=0).int(), last.int(), key.int()
        residues = [number * step + place % step for number, place in zip(residues, (query, key), strict=True)]
    low[:, ~query_on], high[:, ~query_on], at[:, ~key_on] = FAR, -1, -1
    found = low.contiguous(), high.contiguous(), at.contiguous()
    return found if isinstance(x, Halo) else (*found, *(number.int() for number in residues))
