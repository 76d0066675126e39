"""What is chosen by q and k (`keys`, `heads`, `regions(by="max")`), counted out by hand on odd sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import Case, arguments, assert_matches_reference
from selected_cases import CASE, GRID, PREFIX, TOKENS, assert_dense
from torch import Tensor

import kvt_compile
from kvt_compile import SelectionError, select
from kvt_compile.kernels.c.lowering import LOWERING
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.selection import counts_heads, selection_of
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.select.values import split


def kept(text: str, q: Tensor, k: Tensor, grid: tuple[int, ...] | None = None, prefix: int = 0) -> Tensor:
    """`[B, H, Nq, Nk]` of what a selection allows."""
    queries, keys = q.shape[2], k.shape[2]
    chosen = selection_of(text, grid, prefix, queries, keys)
    assert chosen is not None
    at = torch.meshgrid(*map(torch.arange, (*q.shape[:3], keys)), indexing="ij")
    found = chosen.map(q.shape[1], at, chosen.tables(q, k))
    assert found is not None
    return found.expand(*q.shape[:3], keys)


def qk(queries: int = TOKENS, keys: int = TOKENS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, 4, queries, 6), torch.randn(2, 2, keys, 6)


def best(score: list[float], count: int) -> set[int]:
    """The largest, of equal ones those with the smaller index."""
    return set(sorted(range(len(score)), key=lambda n: (-score[n], n))[:count])


@pytest.mark.parametrize("by", ["norm", "mean_query"])
def test_keys(by: str) -> None:
    q, k = qk(queries=11)
    found = kept(f"keys(9, by={by})", q, k)
    for b, h in itertools.product(range(2), range(4)):
        mine = k[b, h // 2].double()
        score = [
            math.sqrt(sum(x * x for x in key.tolist())) if by == "norm" else float(q[b, h].double().mean(0) @ key)
            for key in mine
        ]
        expected = best(score, 9)
        assert found[b, h].tolist() == [[j in expected for j in range(TOKENS)]] * 11


def test_equal_keys_go_by_their_index() -> None:
    q, k = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 5, 2)
    assert kept("keys(0.4)", q, k).tolist() == [[[[True, True, False, False, False]] * 3]]
    assert kept("keys(2, by=mean_query)", q, k)[0, 0, 0].tolist() == [True, True, False, False, False]


def test_heads() -> None:
    q, k = qk(queries=11)
    found = kept("heads(3)", q, k)
    for b, i in itertools.product(range(2), range(11)):
        expected = best([math.sqrt(sum(x * x for x in q[b, h, i].double().tolist())) for h in range(4)], 3)
        assert found[b, :, i].tolist() == [[h in expected] * TOKENS for h in range(4)]
    assert torch.equal(kept("heads(0.7)", q, k), found)  # a share: of 4 heads, 3
    assert kept("heads(1)", torch.ones_like(q), k)[:, 0].all()
    assert not kept("heads(1)", torch.ones_like(q), k)[:, 1:].any()


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("heads", ["each", "all", 2])
def test_regions_by_their_largest_weight(heads: str | int, stride: int) -> None:
    q, k = qk()
    size, keep = (2, 3), 2  # the last regions of both axes are smaller
    places = list(itertools.product(range(5), range(7)))
    region = [y // 2 * 3 + x // 3 for y, x in places]
    tokens = [[n for n in range(35) if region[n] == r] for r in range(9)]
    sampled = [n for r in tokens for n in r[::stride]]
    groups = {"each": [[0], [1], [2], [3]], "all": [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]]}[heads]
    found = kept(f"regions({keep}, {size}, by=max, heads={heads}, stride={stride}) | prefix", q, k, GRID, PREFIX)
    for b, group in itertools.product(range(2), groups):
        mine = torch.stack([q[b, h, PREFIX:].double() for h in group]).mean(0)
        theirs = torch.stack([k[b, h // 2, PREFIX:].double() for h in group]).mean(0)
        weights = (mine[sampled] @ theirs[sampled].T * 6**-0.5).softmax(-1)
        score = [
            [max(float(weights[m, n]) for m, i in enumerate(sampled) for n, j in enumerate(sampled)
                 if region[i] == r and region[j] == s) for s in range(9)]
            for r in range(9)
        ]  # fmt: skip
        chosen = [best(row, keep) for row in score]
        expected = [[region[j] in chosen[region[i]] for j in range(35)] for i in range(35)]
        for h in group:
            assert found[b, h, PREFIX:, PREFIX:].tolist() == expected
            assert found[b, h, :PREFIX].all()
            assert found[b, h, :, :PREFIX].all()


def test_regions_by_their_largest_weight_are_chosen_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than some rows of scores at a time, and the same result."""
    q, k = qk(35, 35)
    whole = kept("regions(2, 3, by=max)", q, k, GRID)
    monkeypatch.setattr("kvt_compile.select.content.ELEMENTS", 1)
    assert torch.equal(kept("regions(2, 3, by=max)", q, k, GRID), whole)


CASES = [
    *(
        CASE.but(id=text, select=text)
        for text in (
            "keys(9)",
            "keys(0.3, by=mean_query) | prefix",
            "keys(5) | prefix(3)",
            "window(3) | prefix | keys(3)",
            "heads(2)",
            "heads(0.6) & (window(3) | prefix)",
            "regions(3, (2, 3), by=max) | prefix",
            "regions(0.3, (2, 3), by=max, heads=2, stride=2) | prefix",
        )
    ),
    CASE.but(id="keys, ranked", select="keys(9)", topk=4),
    CASE.but(id="keys of another sequence", select="keys(5)", queries=11, grid=None, prefix=0),
    CASE.but(id="keys, masked", select="keys(9)", score="where(le(j, i), 0.35*s, -oo)"),
    CASE.but(id="keys, many queries", select="keys(9) | prefix", queries=100, keys=100, topk=100, grid=None),
    CASE.but(id="keys, bfloat16", select="keys(9)", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_aten_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "aten")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_c_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "c")


def test_a_condition_that_is_too_long_goes_to_aten() -> None:
    long = " | ".join(f"window({n}) & keys({n})" for n in range(2, 32))
    spec = KernelSpec("float32", "float32", 8, 8, select=long)
    assert "tokens, expected at most" in (LOWERING.supports(spec) or "")
    assert lowerings.choose("auto", spec, "cpu").name == "aten"


@pytest.mark.parametrize(
    "text", ["keys(37)", "keys(1.0, by=mean_query)", "heads(4)", "heads(1.0)", "regions(1.0, 2, by=max) | prefix"]
)
def test_what_keeps_every_key_is_dense(text: str) -> None:
    assert_dense(text)


def test_a_head_that_is_not_kept_gives_zeros_and_has_no_gradient() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 5, 4, requires_grad=True) for _ in range(3))
    out = kvt_compile.attention(q, k, v, select="heads(1)")
    on = q.norm(dim=-1) == q.norm(dim=-1).amax(1, keepdim=True)
    assert torch.equal((out != 0).any(-1), on)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal((grad != 0).any(-1), on)


@pytest.mark.parametrize("text", ["keys(9)", "heads(2)", "regions(2, 3, by=max, heads=2) | prefix"])
def test_the_operator_is_sound(text: str) -> None:
    torch.library.opcheck(torch.ops.kvt.attention.default, arguments(CASE.but(select=text), "auto"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys(0)", "at least 1"),
        ("keys(3, by=max)", "'norm' or 'mean_query'"),
        ("heads(1.5)", r"\(0, 1\]"),
        ("regions(2, 3, by=norm)", "'mean' or 'max'"),
        ("regions(2, 3, stride=2)", 'goes with by="max"'),
        ("regions(2, 3, by=max, stride=0)", "at least 1"),
        ("keys(3) | topk(4)", "comes last"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises((SelectionError, ValueError), match=message):
        select.parse(text)


def test_text_and_value_are_two_forms_of_the_same() -> None:
    for value in (
        select.keys(9),
        select.keys(0.25, by="mean_query"),
        select.heads(2),
        select.regions(2, (8, 4), by="max", heads=2, stride=8),
    ):
        assert select.parse(str(value)) == value


@pytest.mark.parametrize("text", ["topk({})", "keys({})", "heads({})", "regions({}, 2)", "sinks(2) & topk({})"])
def test_one_key_is_not_all_keys(text: str) -> None:
    """1 == 1.0 in Python: a number and a share are two selections."""
    one, all_of_them = (select.parse(text.format(n)) for n in ("1", "1.0"))
    assert one != all_of_them
    assert len({one, all_of_them, select.parse(text.format("1.0"))}) == 2
    assert [str(split(x)) for x in (one, all_of_them)] == [str(split(select.parse(str(x)))) for x in (one, all_of_them)]


def test_heads_are_counted_where_they_choose_together() -> None:
    assert counts_heads("heads(2)")
    assert not counts_heads("keys(2)")
