"""By which rule a query keeps keys: frozen values, joined by `&` and `|`, each with one text.

    window(13) & topk(64)   <->   Window(13) & TopK(64)   ->   allowed: Window(13), rank: TopK(64)

What ranks (`topk`, `mass`) comes last, within what the rest allows.  `maps.py` says what each rule keeps, `text.py`
reads the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from types import MethodType
from typing import Any, Literal

from kvt_compile.topk import validate

Axes = int | tuple[int, ...]
"""One number for every axis of the grid, or one for each."""
AXES = 3
"""A grid has at most so many axes."""
LARGEST = 2**40
"""No number of a selection is larger: sizes of tensors are not either, and products of three still have a float64."""


class SelectionError(ValueError):
    """A selection that cannot be meant: what was found, what was expected, what to do."""


class Selector:
    """What keeps keys.  `a & b` keeps what both keep, `a | b` what either keeps; `str` is the text."""

    name = ""

    # of those that take a number or a share: topk(1) is one key, topk(1.0) is all of them, and 1 == 1.0
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __and__(self, other: Selector) -> Selector:
        return _joined(Both, self, other)

    def __or__(self, other: Selector) -> Selector:
        return _joined(Either, self, other)

    def __str__(self) -> str:
        texts = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is MISSING:
                texts.append(_shown(value))
            elif value != field.default:
                texts.append(f"{field.name}={_shown(value)}")
        return f"{self.name}({', '.join(texts)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return value if isinstance(value, str) else repr(value)


# ---- what ranks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class TopK(Selector):
    """The k best keys by final score (KVT, arXiv 2106.00515).  ties="all" keeps every key tied with the k-th;
    "lowest" keeps exactly k, of tied keys those with the smaller index."""

    k: int | float
    ties: Literal["all", "lowest"] = "all"
    name = "topk"

    def __post_init__(self) -> None:
        validate(self.k)
        _one_of("topk", "ties", self.ties, ("all", "lowest"))


@dataclass(frozen=True, repr=False)
class Mass(Selector):
    """The fewest best keys whose softmax mass is at least p (nucleus); keys tied with the last are kept too."""

    p: float
    name = "mass"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0.0 < self.p <= 1.0:
            raise SelectionError(f"mass: p is {self.p!r}, expected a share of the softmax mass in (0, 1]")
        object.__setattr__(self, "p", float(self.p))


# ---- where a key stands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Window(Selector):
    """Generalized Neighborhood Attention (NATTEN) on 1, 2 or 3 axes: `size` keys an axis around each query, shifted
    inward at borders, every `dilation`-th key, the same window for `stride` queries; causal: none behind the query.
    A size beyond the axis (divided by the dilation) is the axis."""

    size: Axes
    dilation: Axes = 1
    stride: Axes = 1
    causal: bool | tuple[bool, ...] = False
    name = "window"

    def __post_init__(self) -> None:
        for what in ("size", "dilation", "stride"):
            _axes("window", what, getattr(self, what), 1)
        values = self.causal if isinstance(self.causal, tuple) else (self.causal,)
        if not 1 <= len(values) <= AXES or not all(isinstance(x, bool) for x in values):
            raise SelectionError(
                f"window: causal is {self.causal!r}, expected True, False or one of them for each axis"
            )
        _agree("window", self.size, self.dilation, self.stride, self.causal)


@dataclass(frozen=True, repr=False)
class Halo(Selector):
    """HaloNet (arXiv 2103.12731): a block of queries sees the block and `halo` keys around it, cut at the border."""

    block: Axes
    halo: Axes
    name = "halo"

    def __post_init__(self) -> None:
        _axes("halo", "block", self.block, 1)
        _axes("halo", "halo", self.halo, 0)
        _agree("halo", self.block, self.halo)


@dataclass(frozen=True, repr=False, eq=False)
class Regions(Selector):
    """The grid is cut into regions of `size`; a query region keeps the `keep` best key regions (or that share of them),
    the smaller index first among equals.  No gradient flows through the choice.

    by="mean" (BiFormer, arXiv 2303.08810): by the product of the mean query and the mean key; heads: "each" chooses for
    itself, "all" choose together (their products are added), a number is so many groups of heads.
    by="max" (ProxyAttn, arXiv 2509.24745): by the largest softmax weight between the first of every `stride` tokens of
    both; heads that choose together score with their mean query and mean key."""

    keep: int | float
    size: Axes
    by: Literal["mean", "max"] = "mean"
    heads: Literal["each", "all"] | int = "each"
    stride: int = 4
    name = "regions"

    def __post_init__(self) -> None:
        validate(self.keep)
        _axes("regions", "size", self.size, 1)
        if self.heads not in ("each", "all"):
            _number("regions", "heads", self.heads, 1, '"each", "all" or a number of groups')
        _one_of("regions", "by", self.by, ("mean", "max"))
        _number("regions", "stride", self.stride, 1)
        if self.by == "mean" and self.stride != 4:
            raise SelectionError('regions: stride goes with by="max": a mean is that of all tokens')


@dataclass(frozen=True, repr=False)
class Shifted(Selector):
    """S2 attention (LongLoRA, arXiv 2309.12307, as its flash path has it): the tokens after the prefix in `groups`
    groups of ceil(N / groups); a query keeps its own group, in the second half of the heads with borders shifted by
    half a group, so that the first and the last half group stand alone."""

    groups: int
    name = "shifted"

    def __post_init__(self) -> None:
        _number("shifted", "groups", self.groups, 1)


@dataclass(frozen=True, repr=False)
class Sinks(Selector):
    """The first n keys, for every query (StreamingLLM, arXiv 2309.17453)."""

    n: int
    name = "sinks"

    def __post_init__(self) -> None:
        _number("sinks", "n", self.n, 1)


@dataclass(frozen=True, repr=False)
class Prefix(Selector):
    """The first n keys for every query, and every key for the first n queries: class and register tokens.  None: the
    prefix of the site's tokens, those that stand before the grid."""

    n: int | None = None
    name = "prefix"

    def __post_init__(self) -> None:
        if self.n is not None:
            _number("prefix", "n", self.n, 1)

    def __str__(self) -> str:
        return "prefix" if self.n is None else f"prefix({self.n})"


# ---- what q and k choose, besides regions ----------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Keys(Selector):
    """k keys (or that share of them), the same for every query of a head: the longest, or those that the mean query
    scores highest; the smaller index first among equals.  No gradient flows through the choice.  A surrogate, ours, of
    key-only attention (arXiv 2207.00188), whose gate is not published: scores stay those of query and key."""

    k: int | float
    by: Literal["norm", "mean_query"] = "norm"
    name = "keys"

    def __post_init__(self) -> None:
        validate(self.k)
        _one_of("keys", "by", self.by, ("norm", "mean_query"))


@dataclass(frozen=True, repr=False, eq=False)
class Heads(Selector):
    """Of each query the `keep` heads (or that share of them) in which it is longest, the smaller number first among
    equals; the others keep nothing and give zeros (mixture of heads, arXiv 2410.11842, as its LLaMA code has it)."""

    keep: int | float
    name = "heads"

    def __post_init__(self) -> None:
        validate(self.keep)


@dataclass(frozen=True, repr=False, eq=False)
class Given(Selector):
    """What a function (or module) of q `[B, Hq, Nq, D]` and k `[B, Hk, Nk, D]` returns, broadcastable to
    `[B, Hq, Nq, Nk]`: a bool map, or scores that `topk` ranks in place of the final ones.  With `size`, a bool map of
    regions of the grid, `[B, Hq, regions, regions]`.  No gradient flows through it.  It has no text, so it is given as
    a value."""

    function: Callable[..., Any]
    size: Axes | None = None
    name = "given"

    # by which function it is, not by what that is equal to: it is called, and some have no hash
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self.size == other.size and _same(self.function, other.function)

    def __hash__(self) -> int:
        return hash((id(getattr(self.function, "__self__", self.function)), self.size))

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SelectionError(
                f"given: {self.function!r} cannot be called, expected a function of (q, k) or a module"
            )
        if self.size is not None:
            _axes("given", "size", self.size, 1)

    def __str__(self) -> str:
        what = getattr(self.function, "__name__", type(self.function).__name__)
        return f"given({what}{'' if self.size is None else f', size={_shown(self.size)}'})"


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, MethodType) and isinstance(y, MethodType):  # made anew at each look
        return x.__self__ is y.__self__ and x.__func__ is y.__func__
    return x is y


# ---- joined ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Both(Selector):
    """What all parts keep."""

    parts: tuple[Selector, ...]
    name = "&"

    def __str__(self) -> str:
        return " & ".join(f"({x})" if isinstance(x, Either) else str(x) for x in self.parts)


@dataclass(frozen=True, repr=False)
class Either(Selector):
    """What any part keeps."""

    parts: tuple[Selector, ...]
    name = "|"

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


RANKS = (TopK, Mass)
BY_CONTENT = (Regions, Keys, Heads)
"""Selectors that q and k decide."""
KINDS: dict[str, Callable[..., Selector]] = {
    x.name: x for x in (TopK, Mass, Window, Halo, Regions, Shifted, Sinks, Prefix, Keys, Heads)
}
"""Name -> selector: all that a text can name."""


def _joined(kind: type[Both] | type[Either], left: Selector, right: Selector) -> Selector:
    """Flat, equal parts once, what ranks last."""
    for x in (left, right):
        if not isinstance(x, Selector):
            raise TypeError(f"{x!r} ({type(x).__name__}) is no selection; expected one of {', '.join(KINDS)}")
    parts = [y for x in (left, right) for y in (x.parts if isinstance(x, kind) else (x,))]
    if kind is Either:
        for x in parts:
            if ranks := [y for y in leaves(x) if isinstance(y, RANKS)]:
                raise SelectionError(
                    f"{ranks[0]} stands inside of `|`, but what ranks comes last, within what the rest allows: "
                    f"write (a | b) & {ranks[0]}"
                )
    parts = list(dict.fromkeys(parts))
    ranking = [x for x in parts if isinstance(x, RANKS)]
    if len(ranking) > 1:
        raise SelectionError(f"{ranking[0]} and {ranking[1]} both rank, expected at most one of them")
    parts = [x for x in parts if x not in ranking] + list(ranking)
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def leaves(x: Selector) -> Iterator[Selector]:
    """The selectors it is joined of."""
    if isinstance(x, Both | Either):
        for part in x.parts:
            yield from leaves(part)
    else:
        yield x


@lru_cache(maxsize=1024)
def by_content(x: Selector) -> bool:
    """Whether q and k choose."""
    return any(isinstance(y, BY_CONTENT) for y in leaves(x))


def routed(x: Selector) -> Regions | None:
    """The regions of `regions(...)` or `regions(...) | prefix`."""
    parts = x.parts if isinstance(x, Either) else (x,)
    routes = [y for y in parts if isinstance(y, Regions)]
    return routes[0] if len(routes) == 1 and all(y == Prefix() for y in parts if y is not routes[0]) else None


def split(x: Selector) -> tuple[Selector | None, TopK | Mass | None]:
    """(what may be kept, by what it is ranked); None: every key may, and it is not ranked."""
    parts = x.parts if isinstance(x, Both) else (x,)
    rank = next((y for y in parts if isinstance(y, TopK | Mass)), None)
    rest = tuple(y for y in parts if not isinstance(y, TopK | Mass))
    return (None if not rest else rest[0] if len(rest) == 1 else Both(rest)), rank


def for_node(x: Selector) -> tuple[str, int | float | None]:
    """A selection as an operator takes it: (text, k).  k is a number or share of keys, None where nothing is ranked by
    topk; the text is empty where the topk best of all keys are kept, and has topk only where its ties say more."""
    allowed, rank = split(x)
    if not isinstance(rank, TopK):
        return str(x), None
    if rank.ties != "all":
        ranked = TopK(1.0, rank.ties)
        return str(ranked if allowed is None else allowed & ranked), rank.k
    return ("" if allowed is None else str(allowed)), rank.k


# ---- checks ----------------------------------------------------------------------------------------------------------


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """13 -> (13, 13) for two axes."""
    return value if isinstance(value, tuple) else (value,) * axes


def _number(kind: str, what: str, value: Any, least: int, expected: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise SelectionError(
            f"{kind}: {what} is {value!r}, expected {expected or f'a whole number of at least {least}'}"
        )


def _axes(kind: str, what: str, value: Any, least: int) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(values) <= AXES:
        raise SelectionError(
            f"{kind}: {what} has {len(values)} numbers, expected one for all axes or one for each of 1 to 3"
        )
    for x in values:
        _number(kind, what, x, least)


def _agree(kind: str, *values: Any) -> None:
    found = {len(x) for x in values if isinstance(x, tuple)}
    if len(found) > 1:
        raise SelectionError(
            f"{kind}: its tuples have {' and '.join(map(str, sorted(found)))} numbers, expected one an axis"
        )


def _one_of(kind: str, what: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SelectionError(f"{kind}: {what} is {value!r}, expected {' or '.join(map(repr, allowed))}")
