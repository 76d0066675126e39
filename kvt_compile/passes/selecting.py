"""Site + policy -> by which selection its queries keep keys, and where its tokens stand; or why it stays dense.

select = "window(13) | prefix"                       every site
select = {"blocks.*": "window(13) & topk(64)"}       by module path, first match wins, as for topk
grid = (14, 14), prefix = 1                          where the graph does not say it, or says something else

Where tokens stand is read from the graph (`reading/grid.py`); what the user says goes before it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvt_compile.passes.reading.grid import Placed, grid_of
from kvt_compile.passes.site import AttentionSite, Fused
from kvt_compile.select.function import Condition, has_given
from kvt_compile.select.geometry import (
    Geometry,
    check_geometry,
    groups_of_heads,
    needs_grid,
    needs_prefix,
    resolve_grid,
)
from kvt_compile.select.share import kept_share
from kvt_compile.select.text import parse
from kvt_compile.select.values import Regions, SelectionError, Selector, for_node, leaves, split
from kvt_compile.topk import TopK

Select = Selector | str | None
SelectRule = Select | Mapping[str, Select] | Callable[[AttentionSite], Select]
Grid = int | tuple[int, ...] | None
GridRule = Grid | Mapping[str, Grid]
PrefixRule = int | None | Mapping[str, int | None]


@dataclass(frozen=True)
class Functions:
    """What functions decide of a site's selection."""

    whole: Selector
    """The selection that they are a part of."""
    condition: Condition | None = None
    """What came of a call with the site's q and k; None: none was called yet."""
    returned: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """What each of them returned there, as fakes."""
    tensors: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """Those that the condition reads, as fakes."""


@dataclass(frozen=True)
class Selected:
    """What a node is told besides k."""

    text: str
    geometry: Geometry | None
    """None where the selection does not ask for it."""
    kept: float | None
    """The share of pairs it allows, before anything is ranked; None where that is not known beforehand."""
    placed: Placed | None = None
    """In place of a geometry: where its sizes are read from at run time."""
    functions: Functions | None = None
    """What is no text, and becomes a condition of the node's score."""

    @property
    def whole(self) -> str:
        """The selection as it was asked for, what functions decide of it included."""
        return self.text if self.functions is None else str(self.functions.whole)

    @property
    def arguments(self) -> tuple[str, list[int] | None, int]:
        """The last arguments of the node, where no size is read from the graph."""
        if self.geometry is None or not self.text:
            return self.text, None, 0
        said = parse(self.text)
        grid = list(self.geometry.grid) if needs_grid(said) else None
        return self.text, grid, self.geometry.prefix if needs_prefix(said) else 0

    def __str__(self) -> str:
        where = f" on {self.where}" if self.where else ""
        return f"{self.whole}{where}{'' if self.kept is None else f', {100 * self.kept:.3g} %'}"

    @property
    def where(self) -> str:
        """Where the tokens stand, if the selection asks: `14x14 + 1`."""
        return str(self.placed or self.geometry or "")


def rule_for(rule: Any, site: AttentionSite) -> Any:
    """What a rule by module path says of a site; None where it says nothing."""
    if isinstance(rule, Mapping):
        for pattern, value in rule.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in site.where.names):
                return value
        return None
    return rule(site) if callable(rule) else rule


def selected(site: AttentionSite, rule: SelectRule, grid: GridRule, prefix: PrefixRule) -> tuple[TopK, Selected | None]:
    """(k, what else the node is told; None where the k best of all keys are kept).

    Raises SelectionError with the reason why the site stays dense."""
    value = rule_for(rule, site)
    if value is None:
        raise SelectionError("select is None for this site")
    chosen = parse(value) if isinstance(value, str) else value
    text, best = for_node(chosen)
    topk: TopK = 1.0 if best is None else best
    if not text:
        return topk, None
    if not isinstance(site.plan, Fused):
        raise SelectionError(f"it cannot be fused ({site.tier_reason}), and {text} is generated for fused sites only")
    for part in leaves(chosen):
        if isinstance(part, Regions) and isinstance(site.heads, int):
            groups_of_heads(part, site.heads)
    if has_given(chosen):
        return topk, _by_functions(site, chosen, grid, prefix)
    asked = needs_grid(chosen)
    if not isinstance(site.queries, int) or not isinstance(site.keys, int) or not isinstance(site.heads, int):
        return topk, Selected(text, None, None, _placed(site, chosen, grid, prefix) if needs_prefix(chosen) else None)
    geometry = _geometry(site, site.keys, grid, prefix) if needs_prefix(chosen) else Geometry(())
    if not asked:
        geometry = Geometry((), geometry.prefix)
    allowed, _ = split(chosen)
    if allowed is None:
        return topk, Selected(text, None, None)
    check_geometry(allowed, geometry, site.queries, site.keys)
    share = kept_share(allowed, geometry, site.heads, site.queries, site.keys)
    return topk, Selected(text, geometry if needs_prefix(chosen) else None, share)


def _by_functions(site: AttentionSite, chosen: Selector, grid: GridRule, prefix: PrefixRule) -> Selected:
    """What is known before its functions are called (`rewriting/trial.py`)."""
    if not needs_prefix(chosen):
        return Selected("", None, None, functions=Functions(chosen))
    if not isinstance(site.queries, int) or not isinstance(site.keys, int):
        raise SelectionError(
            f"{chosen} asks where tokens stand, and how many there are is known only at run time: a function beside it "
            "takes numbers"
        )
    geometry = _geometry(site, site.keys, grid, prefix)
    geometry = geometry if needs_grid(chosen) else Geometry((), geometry.prefix)
    return Selected("", geometry, None, functions=Functions(chosen))


def _placed(site: AttentionSite, chosen: Selector, grid: GridRule, prefix: PrefixRule) -> Placed:
    """Where the tokens stand, of a site whose number of tokens is known only at run time."""
    read, before = grid_of(site.plan), rule_for(prefix, site)
    if rule_for(grid, site) is not None or read is None:
        raise SelectionError(
            f"how many tokens it has is known only at run time, {chosen} asks where they stand, and "
            + ("a grid of fixed sizes cannot say it" if read is not None else "the graph does not say it")
        )
    return read if before is None else replace(read, prefix=before)


def _geometry(site: AttentionSite, tokens: int, grid: GridRule, prefix: PrefixRule) -> Geometry:
    found = grid_of(site.plan)
    read = None if found is None else found.geometry
    said, before = rule_for(grid, site), rule_for(prefix, site)
    if said is not None:
        before = before if before is not None else read.prefix if read else 0
        return Geometry(resolve_grid(said, before, tokens), before)
    if read is None:
        raise SelectionError(
            "where its tokens stand cannot be read from the graph; say it with grid= (one size may be -1) and prefix=, "
            f"for this site grid={{{site.where.module or '*'!r}: ...}}"
        )
    return read if before is None else Geometry(read.grid, before)


def validate_select(rule: SelectRule) -> SelectRule:
    """The rule with its texts read.  Raises SelectionError or TypeError."""
    if isinstance(rule, Mapping):
        return {pattern: _value(value) for pattern, value in rule.items()}
    return rule if callable(rule) else _value(rule)


def _value(value: Any) -> Selector | None:
    if value is None or isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return parse(value)
    raise TypeError(
        f"select is {value!r} ({type(value).__name__}), expected a value of kvt_compile.select, its text such as "
        "'window(13) & topk(64)', None, or a mapping from module path to one of them"
    )


def validate_places(grid: GridRule, prefix: PrefixRule) -> None:
    """Raises TypeError unless both rules hold numbers."""
    for value in grid.values() if isinstance(grid, Mapping) else (grid,):
        sizes = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(isinstance(x, int) and not isinstance(x, bool) and (x == -1 or x >= 1) for x in sizes):
            raise TypeError(
                f"grid is {value!r}, expected sizes of 1 to 3 axes such as (14, 14), -1 for whatever is left"
            )
    for value in prefix.values() if isinstance(prefix, Mapping) else (prefix,):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise TypeError(f"prefix is {value!r}, expected how many tokens stand before the grid")
