"""The algebra of selections: text and value, what is refused, and what each selector keeps, counted out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvt_compile
from kvt_compile import SelectionError, select
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.select import Geometry
from kvt_compile.select.values import KINDS, Selector, for_node

TEXTS = [
    "topk(64)",
    "topk(0.25, ties=lowest)",
    "window(13)",
    "window((13, 7), dilation=2, stride=(3, 1), causal=(True, False))",
    "window((9,)) & mass(0.9)",
    "(halo(8, 3) | prefix) & topk(64)",
    "regions(0.125, (8, 8), heads=all) | prefix(2)",
    "shifted(4) | sinks(4)",
    "window(13) & halo(8, 3) | sinks(4)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_value_are_two_forms_of_the_same(text: str) -> None:
    assert str(select.parse(text)) == text
    assert select.parse(text) == select.parse(text.replace(" ", ""))
    assert hash(select.parse(text)) == hash(select.parse(text))


def test_python_and_text_agree() -> None:
    value = (select.window(13) | select.prefix()) & select.topk(64)
    assert value == select.parse("topk(64) & (window(13) | prefix())")  # what ranks goes last
    assert select.parse("regions(1/8, 8, heads='all')") == select.regions(0.125, 8, heads="all")
    assert select.parse("window(3) & window(3) & window(5)") == select.window(3) & select.window(5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("windw(3)", "did you mean 'window'"),
        ("window", "no selector"),
        ("window()", "missing a required argument: 'size'"),
        ("window(3, sze=2)", "unexpected keyword"),
        ("window(0)", "at least 1"),
        ("window(True)", "whole number"),
        ("window(3, causal=1)", "True, False"),
        ("window((3, 3, 3, 3))", "4 numbers"),
        ("window((3, 3), dilation=(1, 1, 1))", "2 and 3 numbers"),
        ("halo(8, -1)", "at least 0"),
        ("topk(0)", "at least 1"),
        ("topk(8, ties=highest)", "no number"),
        ("topk(8, ties=each)", "'all' or 'lowest'"),
        ("mass(1.5)", r"\(0, 1\]"),
        ("regions(2, 8, heads=0)", "a number of groups"),
        ("topk(4) | sinks(2)", r"write \(a \| b\) & topk\(4\)"),
        ("sinks(2) | (window(3) & mass(0.5))", "comes last"),
        ("topk(4) & mass(0.5)", "both rank"),
        ("window(3) + sinks(2)", "not part of a selection"),
        ("window(3) and sinks(2)", "no selector"),
        ("__import__('os').system('x')", "no selector"),
        ("window(3)\n", "character 9"),
        ("window(size)", "no number"),
        ("(" * 200 + "window(3)" + ")" * 200, "nested too deeply|too many nested"),
        (" | ".join(f"sinks({n})" for n in range(1, 300)), "characters"),
        ("window(1" + "0" * 400 + ")", "whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises((SelectionError, ValueError), match=message):
        select.parse(text)


def test_deep_texts_end() -> None:
    text = "sinks(1)"
    for n in range(40):
        text = f"({text} {'&|'[n % 2]} sinks({n + 2}))"
    with pytest.raises(SelectionError, match="nested deeper"):
        select.parse(text)


def test_only_a_selection_joins_a_selection() -> None:
    with pytest.raises(TypeError, match="is no selection"):
        select.window(3) & 64  # type: ignore[operator]


# ---- the maps, against definitions written out query by query --------------------------------------------------------


Grid = tuple[int, ...]


def kept(text: str, grid: Grid, prefix: int = 0, heads: int = 2, qk: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`[B, H, N, N]` of what a selection allows."""
    tokens = math.prod(grid) + prefix
    chosen = selection_of(text, grid, prefix, tokens, tokens)
    assert chosen is not None
    q, k = qk or (torch.randn(1, heads, tokens, 4), torch.randn(1, heads, tokens, 4))
    at = torch.meshgrid(*map(torch.arange, (q.shape[0], heads, tokens, tokens)), indexing="ij")
    found = chosen.map(heads, at, chosen.tables(q, k))
    assert found is not None
    return found.expand(q.shape[0], heads, tokens, tokens)


def pairs(grid: tuple[int, ...], keeps: Callable[[tuple[int, ...], tuple[int, ...]], bool]) -> Tensor:
    places = list(itertools.product(*map(range, grid)))
    return torch.tensor([[keeps(query, key) for key in places] for query in places])


def window_of(x: int, size: int, kernel: int, dilation: int, stride: int, causal: bool) -> set[int]:
    """The keys of one axis, by listing the places of the query's residue."""
    group = [y for y in range(size) if y % dilation == x % dilation]
    place = group.index(x)
    first = place // stride * stride
    if causal:
        leader = min(first + stride - 1, len(group) - 1)
        return {y for n, y in enumerate(group) if n <= place and leader - n < kernel}
    leader = min(first + stride // 2, len(group) - 1)
    start = min(max(leader - kernel // 2, 0), len(group) - kernel)
    return set(group[start : start + kernel])


@pytest.mark.parametrize(
    ("grid", "size", "dilation", "stride", "causal"),
    [
        ((11,), (3,), (1,), (1,), (False,)),
        ((11,), (4,), (1,), (3,), (False,)),  # an even window reaches further to the left
        ((11,), (3,), (3,), (2,), (False,)),  # a dilation that does not divide
        ((11,), (4,), (2,), (2,), (True,)),
        ((5, 7), (3, 5), (1, 1), (1, 1), (False, False)),
        ((5, 7), (2, 3), (2, 2), (1, 2), (False, True)),
        ((2, 3, 5), (2, 3, 3), (1, 1, 1), (1, 1, 2), (True, False, False)),
    ],
)
def test_window(grid: Grid, size: Grid, dilation: Grid, stride: Grid, causal: tuple[bool, ...]) -> None:
    expected = pairs(grid, lambda query, key: all(
        y in window_of(x, *rest) for x, y, *rest in zip(query, key, grid, size, dilation, stride, causal, strict=True)
    ))  # fmt: skip
    text = str(select.window(size, dilation, stride, causal))
    assert torch.equal(kept(text, grid)[0, 0], expected)
    if not any(causal):
        assert (expected.sum(-1) == math.prod(size)).all()  # shifted inward, never cut


def test_a_window_larger_than_an_axis_is_the_axis() -> None:
    assert kept("window(99)", (5, 7)).all()
    assert torch.equal(kept("window((99, 3))", (5, 7)), kept("window((5, 3))", (5, 7)))


@pytest.mark.parametrize(("grid", "block", "halo"), [((5, 7), 2, 1), ((9,), 4, 3), ((6, 6), 3, 0)])
def test_halo(grid: tuple[int, ...], block: int, halo: int) -> None:
    def keeps(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        starts = [x // block * block for x in query]
        return all(x - halo <= y < x + block + halo for x, y in zip(starts, key, strict=True))

    assert torch.equal(kept(f"halo({block}, {halo})", grid)[0, 1], pairs(grid, keeps))


def test_shifted() -> None:
    # 10 tokens in groups of 4; shifted: borders at 2, 6, 10
    plain, moved = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    found = kept("shifted(3)", (10,), heads=4)[0]
    for head, groups in enumerate([plain, plain, moved, moved]):
        assert found[head].tolist() == [[x == y for y in groups] for x in groups]


def test_sinks_and_prefix() -> None:
    assert kept("sinks(2)", (5,))[0, 0].tolist() == [[True, True, False, False, False]] * 5
    expected = [[j < 2 or i < 2 for j in range(5)] for i in range(5)]
    assert kept("prefix(2)", (5,))[0, 0].tolist() == kept("prefix", (3,), prefix=2)[0, 0].tolist() == expected


def test_tokens_before_the_grid_are_not_on_it() -> None:
    on_grid = kept("window(3)", (5, 7))[0, 0]
    found = kept("window(3) | prefix", (5, 7), prefix=2)[0, 0]
    assert found[:2].all()
    assert found[:, :2].all()
    assert torch.equal(found[2:, 2:], on_grid)
    with pytest.raises(SelectionError, match=r"write \(window\(3\)\) \| prefix"):
        kept("window(3)", (5, 7), prefix=2)


@pytest.mark.parametrize("heads", ["each", "all", 2])
def test_regions(heads: str | int) -> None:
    torch.manual_seed(3)
    grid, size, keep = (5, 7), (2, 3), 2  # the last regions of both axes are smaller
    q, k = torch.randn(2, 4, 35, 6), torch.randn(2, 2, 35, 6)
    groups = {"each": [[0], [1], [2], [3]], "all": [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]]}[heads]
    places = list(itertools.product(range(5), range(7)))
    region = [y // 2 * 3 + x // 3 for y, x in places]
    found = kept(f"regions({keep}, {size}, heads={heads})", grid, heads=4, qk=(q, k))
    tokens = [[n for n in range(35) if region[n] == r] for r in range(9)]
    for b, group in itertools.product(range(2), groups):
        score = torch.zeros(9, 9, dtype=torch.float64)
        for h, r, s in itertools.product(group, range(9), range(9)):
            score[r, s] += q[b, h, tokens[r]].double().mean(0) @ k[b, h // 2, tokens[s]].double().mean(0)
        best = [set(sorted(range(9), key=lambda s, r=r: (-score[r, s].item(), s))[:keep]) for r in range(9)]
        expected = [[region[j] in best[region[i]] for j in range(35)] for i in range(35)]
        assert all(found[b, h].tolist() == expected for h in group)


def test_equal_regions_go_by_their_number() -> None:
    q, k = torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2)
    assert kept("regions(2, 2)", (8,), heads=1, qk=(q, k))[0, 0].tolist() == [[True] * 4 + [False] * 4] * 8


def test_joined() -> None:
    a, b = kept("window(3)", (5, 7)), kept("halo(2, 1)", (5, 7))
    assert torch.equal(kept("window(3) & halo(2, 1)", (5, 7)), a & b)
    assert torch.equal(kept("window(3) | halo(2, 1)", (5, 7)), a | b)


@pytest.mark.parametrize(
    ("text", "grid", "prefix", "tokens", "message"),
    [
        ("window(3)", None, 0, 9, "needs a grid"),
        ("window(3)", (3, 4), 0, 9, "as many queries and keys as there are tokens, 12"),
        ("window((3, 3))", (9,), 0, 9, "2 numbers for a grid of 1 axes"),
        ("window(2, dilation=5)", (3, 3), 0, 9, "larger than an axis"),
        ("halo(3, 1)", (8,), 1, 9, "before the grid"),
        ("halo(3, 1) & prefix", (8,), 1, 9, "before the grid"),
        ("regions(2, 2)", (1, 1, 1, 9), 0, 9, "1 to 3 axes"),
        ("sinks(2)", None, -1, 9, "at least 0"),
    ],
)
def test_a_geometry_that_does_not_fit(text: str, grid: Grid | None, prefix: int, tokens: int, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        selection_of(text, grid, prefix, tokens, tokens)


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(SelectionError, match="4 heads do not divide into 3 groups"):
        kept("regions(2, 2, heads=3)", (8,), heads=4)


def test_a_node_says_no_more_than_it_needs() -> None:
    assert for_node(select.parse("topk(64)")) == ("", 64)
    assert for_node(select.parse("window(3) & topk(64)")) == ("window(3)", 64)
    assert for_node(select.parse("window(3) & topk(64, ties=lowest)")) == ("window(3) & topk(1.0, ties=lowest)", 64)
    assert for_node(select.parse("mass(0.5)")) == ("mass(0.5)", None)


def test_the_geometry_says_itself() -> None:
    assert str(Geometry((64, 64), 1)) == "64x64 + 1"
    assert Geometry((2, 3), 1).tokens == 7


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_every_selector_says_where_it_comes_from(kind: type[Selector]) -> None:
    assert kind.__doc__
    assert getattr(kvt_compile.select, kind.name) is kind
