"""Index arithmetic: a coordinate read through layouts names the very element torch puts there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from readings import assert_reads, module_of, value_of
from torch import Tensor, nn

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.coords import ZERO, Axes, Coord, Space

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Chain(nn.Module):
    """Applies layout operations, given as text, one after the other."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = eval(f"x{step}", {"x": x, "torch": torch})
        return x

    def __repr__(self) -> str:
        return "x" + "".join(self.steps)


# ---- chains of layouts -----------------------------------------------------------------------------------------------


@st.composite
def chains(draw: Draw) -> tuple[Chain, Tensor]:
    """A tensor that counts its elements, and a random chain of layout operations that ends with at most four axes."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    start = torch.arange(math.prod(shape)).reshape(shape)
    x, steps = start, []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.sampled_from(_options(x, draw)))
        changed = eval(f"x{step}", {"x": x, "torch": torch})
        if changed.numel() and changed.numel() <= 600 and changed.dim() <= 6:
            x = changed
            steps.append(step)
    if x.dim() > 4:
        steps.append(".flatten(3)")
    return Chain(steps), start


def _options(x: Tensor, draw: Draw) -> list[str]:
    rank = x.dim()
    options = [f".reshape({_factors(x.numel(), draw)})", ".unsqueeze(0)", "[None]", ".flatten()", ".clone()"]
    if not rank:
        return options
    d = draw(st.integers(0, rank - 1))
    size, order = x.shape[d], draw(st.permutations(range(rank)))
    a = draw(st.integers(0, size - 1))
    b = draw(st.integers(a + 1, size))
    at = ", ".join([":"] * d)
    comma = ", " if at else ""
    options += [f".permute({list(order)})", f".transpose({d}, {-1})", f".movedim({d}, 0)", f".unsqueeze({d - rank})"]
    options += [
        f"[{at}{comma}{a}:{b}]",
        f"[{at}{comma}{a}]",
        f"[{at}{comma}{a - size}]",
        f"[{at}{comma}::2]",
        f"[{at}{comma}{a}::3]",
    ]
    options += [f".narrow({d}, {a}, {b - a})", f".select({d}, {a})", f"[..., {draw(st.integers(0, x.shape[-1] - 1))}:]"]
    options += [f".repeat_interleave(2, dim={d})", f".repeat({', '.join('2' if n == d else '1' for n in range(rank))})"]
    options += [f".chunk({min(size, 2)}, dim={d})[0]", f".split({b - a}, dim={d})[-1]", f".unbind({d})[{a}]"]
    options += [f".expand(2, {', '.join(['-1'] * rank)})", f".squeeze({d})", f".swapaxes({d}, 0)", ".contiguous()"]
    if rank > 1:
        options += [".mT", f".flatten({rank - 2})"]
    if size % 2 == 0:
        options.append(f".unflatten({d}, (2, {size // 2}))")
    return options


def _factors(number: int, draw: Draw) -> str:
    sizes: list[int] = []
    while number > 1:
        divisors = [n for n in range(2, number + 1) if number % n == 0]
        sizes.append(draw(st.sampled_from(divisors)))
        number //= sizes[-1]
    sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return ", ".join(map(str, sizes))


@given(chains())
@settings(max_examples=400)
def test_a_chain_of_layouts_reads_what_torch_puts_there(case: tuple[Chain, Tensor]) -> None:
    chain, x = case
    assert_reads(chain, [x])


def test_most_chains_are_read_to_the_end() -> None:
    """The property above would hold for a reader that gives up: this one counts."""
    outcomes: list[bool] = []

    @given(chains())
    @settings(max_examples=150, derandomize=True, database=None)
    def count(case: tuple[Chain, Tensor]) -> None:
        outcomes.append(assert_reads(*_with_list(case)).opaque)

    count()
    assert sum(outcomes) < 0.35 * len(outcomes)  # what is left: borders that fall inside a factor, steps of steps


def _with_list(case: tuple[Chain, Tensor]) -> tuple[Chain, list[Tensor]]:
    return case[0], [case[1]]


@pytest.mark.parametrize(
    ("shape", "function", "text"),
    [
        ((6, 2), lambda x: x.view(2, 3, 2), "c0[h + 3*b, i]"),
        ((2, 3, 2), lambda x: x.view(6, 2), "c0[b // 3, b % 3, h]"),
        ((2, 3), lambda x: x.t(), "c0[h, b]"),
        ((2, 3), lambda x: x.unsqueeze(1).expand(2, 4, 3), "c0[b, i]"),
        ((4, 5), lambda x: x[1:, ::2], "c0[b + 1, 2*h]"),
        ((4, 5), lambda x: x[2], "c0[2, b]"),
        ((3, 2), lambda x: x.repeat_interleave(2, 0), "c0[b // 2, h]"),
        ((3, 2), lambda x: x.repeat(2, 1), "c0[b % 3, h]"),
        ((4, 3, 3), lambda x: x.unsqueeze(0).expand(2, 4, 3, 3).reshape(8, 3, 3), "c0[b % 4, h, i]"),
        ((2, 12), lambda x: x.view(2, 3, 4).transpose(1, 2).reshape(2, 12), "c0[b, 4*(h % 3) + h // 3]"),
        ((1, 3), lambda x: x.expand(5, 3), "c0[0, h]"),
        ((3, 4), lambda x: x[:, 1:3].flatten(), "c0[b // 2, b % 2 + 1]"),
    ],
    ids=["split", "merge", "transpose", "expand", "slice", "select", "repeat_interleave", "repeat", "swin mask",
         "shuffle", "broadcast", "merge a slice"],
)  # fmt: skip
def test_text(shape: tuple[int, ...], function: Callable[[Tensor], Tensor], text: str) -> None:
    x = torch.arange(math.prod(shape)).reshape(shape)
    reading = assert_reads(module_of(function), [x])
    assert not reading.opaque
    assert language.parse(reading.text) == language.parse(text), reading.text


# ---- Space -----------------------------------------------------------------------------------------------------------

sizes_lists = st.lists(st.integers(1, 6), min_size=0, max_size=4)


def every_assignment(coords: tuple[Coord, ...]) -> Any:
    """Every way the root atoms of these coordinates can count."""
    atoms = [a for c in coords for a in c.digits]
    for values in itertools.product(*(range(int(a.size)) for a in atoms)):
        yield dict(zip(atoms, values, strict=True))


def linear(values: list[int], sizes: list[int]) -> int:
    total = 0
    for value, size in zip(values, sizes, strict=True):
        total = total * size + value
    return total


@given(sizes_lists, st.data())
@settings(max_examples=150)
def test_regroup_keeps_the_row_major_position(before: list[int], data: st.DataObject) -> None:
    after = data.draw(st.permutations(before)) if data.draw(st.booleans()) else [math.prod(before[:2]), *before[2:]]
    assume(math.prod(before) <= 200)
    space = Space()
    coords = tuple(space.fresh(f"a{n}", size) for n, size in enumerate(before))
    again = space.regroup(coords, after)
    if again is None:
        assert sorted(before) != before or after != before
        return
    assert [space.size(c) for c in again] == after
    for roots in every_assignment(coords):
        old = linear([value_of(space, c, roots) for c in coords], before)
        assert old == linear([value_of(space, c, roots) for c in again], after)


def test_regroup_splits_an_atom_once_for_everybody() -> None:
    space = Space()
    whole = space.fresh("x", 12)
    first = space.regroup([whole], [3, 4])
    assert first is not None
    second = space.regroup([whole], [3, 2, 2])
    assert second is not None
    assert space.resolve(first[1]).digits == (*second[1].digits, *second[2].digits)
    assert space.resolve(whole).digits == tuple(a for c in second for a in c.digits)


@pytest.mark.parametrize(
    ("before", "after"),
    [([2, 3], [3, 2]), ([4], [3]), ([4], [2]), ([2], [2, 2]), ([6, 4], [8, 3])],
    ids=["border inside", "other size", "too few", "too many", "no common border"],
)
def test_regroup_refuses(before: list[int], after: list[int]) -> None:
    space = Space()
    assert space.regroup([space.fresh(str(n), size) for n, size in enumerate(before)], after) is None


def test_regroup_wants_whole_dimensions() -> None:
    space = Space()
    x = space.fresh("x", 4)
    assert space.regroup([Coord(x.digits, start=1)], [2, 2]) is None
    assert space.regroup([Coord(x.digits, step=2)], [4]) is None


@given(st.integers(1, 24), st.integers(1, 24))
def test_cut_is_division_with_remainder(size: int, low: int) -> None:
    space = Space()
    coord = space.fresh("x", size)
    parts = space.cut(coord, low)
    assert (parts is not None) == (size % low == 0)
    if parts is not None:
        for roots in every_assignment((coord,)):
            value = value_of(space, coord, roots)
            assert (value_of(space, parts[0], roots), value_of(space, parts[1], roots)) == divmod(value, low)


@given(st.integers(2, 9), st.data())
def test_inside_a_slice_and_out_again(size: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    space = Space()
    coord = space.fresh("x", size)
    inner = space.inside(coord, start, length)
    assert space.inside(coord, start, length) == inner  # the same slice is the same coordinate
    for roots in every_assignment((coord,)):
        value = value_of(space, coord, roots)
        if start <= value < start + length and length > 1:
            assert value_of(space, inner, roots) == value - start
    out = space.shifted(inner, start, 1)
    assert out is not None
    assert out == coord or length == 1


def test_the_inside_of_a_slice_can_be_split() -> None:
    space = Space()
    coord = space.fresh("x", 7)
    inner = space.inside(coord, 1, 6)
    parts = space.cut(inner, 3)
    assert parts is not None
    for roots in every_assignment((coord,)):
        value = value_of(space, coord, roots)
        if value >= 1:
            assert (value_of(space, parts[0], roots), value_of(space, parts[1], roots)) == divmod(value - 1, 3)


def test_a_shift_that_was_split_is_still_right() -> None:
    space = Space()
    coord = space.fresh("x", 7)
    inner = space.inside(coord, 1, 6)
    space.cut(inner, 3)
    out = space.shifted(space.resolve(inner), 1, 1)
    assert out is not None
    for roots in every_assignment((coord,)):
        if value_of(space, coord, roots) >= 1:
            assert value_of(space, out, roots) == value_of(space, coord, roots)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3))
def test_slices_of_slices(size: int, start: int, step: int, start2: int, step2: int) -> None:
    space = Space()
    coord = space.fresh("x", size)
    once = space.shifted(coord, start, step)
    assert once is not None
    twice = space.shifted(once, start2, step2)
    for roots in every_assignment((coord,)):
        value = value_of(space, coord, roots)
        assert value_of(space, once, roots) == start + step * value
        if twice is not None:
            assert value_of(space, twice, roots) == start2 + step2 * (start + step * value)


def test_a_copy_is_split_alone() -> None:
    space = Space()
    coord = space.fresh("x", 6)
    other = space.copy()
    assert other.cut(coord, 3) is not None
    assert space.resolve(coord) == coord
    assert len(other.resolve(coord).digits) == 2


def test_size_one_has_no_atom() -> None:
    space = Space()
    assert space.fresh("x", 1) == ZERO
    assert space.regroup([ZERO, ZERO], [1]) == (ZERO,)
    assert space.regroup([], [1, 1]) == (ZERO, ZERO)


def test_dynamic_sizes() -> None:
    batch = sympy.Symbol("s0", integer=True, positive=True)
    space = Space()
    merged = space.fresh("x", 4 * batch)
    parts = space.regroup([merged], [batch, 4])
    assert parts is not None
    assert [space.size(c) for c in parts] == [batch, 4]
    assert space.regroup([space.fresh("y", batch)], [2, batch / 2]) is None  # nobody knows whether it is even
    axes = {"b": space.resolve(merged).digits}
    assert str(Axes(space, axes, {"b": language.b}).text(parts[1])) == "mod(b, 4)"


def test_axes_does_not_know_foreign_atoms() -> None:
    space = Space()
    known, foreign = space.fresh("x", 3), space.fresh("y", 3)
    axes = Axes(space, {"i": known.digits}, {"i": language.i})
    assert axes.knows(known)
    assert axes.knows(space.inside(known, 1, 2))
    assert not axes.knows(foreign)
    assert not axes.knows(space.inside(foreign, 1, 2))
