"""Attention under a selection: every lowering against the reference, the identity with dense, every way of calling."""

from __future__ import annotations

import pytest
import torch
from oracles import Case, arguments, assert_matches_reference
from selected_cases import CASE, CASES, GRID, PREFIX, assert_dense, qkv
from torch import Tensor
from torch.nn import functional as F

import kvt_compile
from kvt_compile import SelectionError, select
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.tiles import refusal
from kvt_compile.select.values import for_node


@pytest.mark.parametrize("case", CASES, ids=str)
def test_aten_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "aten")


@pytest.mark.parametrize("case", [case for case in CASES if not refusal(case.select)], ids=str)
def test_c_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "c")


def test_what_c_does_not_list_goes_to_aten() -> None:
    for case in CASES:
        spec = KernelSpec("float32", "float32", 8, 8, select=case.select)
        assert lowerings.choose("auto", spec, "cpu").name == ("aten" if refusal(case.select) else "c")
    assert {case.id for case in CASES if refusal(case.select)} == {"by mass", "first of ties"}


ALL = ["window(7) | prefix", "window(99) | prefix", "halo(7, 0) | prefix", "regions(1.0, 2) | prefix", "prefix(37)",
       "sinks(37)", "keys(37)", "heads(4)", "heads(4) & (window(7) | prefix)", "keys(37) | window(3)",
       "topk(37)", "topk(1.0, ties=lowest)", "mass(1.0)",
       "(window(7) | prefix) & topk(37)"]  # fmt: skip


@pytest.mark.parametrize("text", ALL)
def test_what_keeps_every_key_is_dense(text: str) -> None:
    assert_dense(text)


def test_topk_is_one_word_of_it() -> None:
    q, k, v = qkv()
    assert torch.equal(kvt_compile.attention(q, k, v, select="topk(9)"), kvt_compile.topk_attention(q, k, v, topk=9))


def test_a_value_and_its_text_give_the_same() -> None:
    q, k, v = qkv(35)
    value = select.window(3) & select.topk(4)
    assert torch.equal(
        kvt_compile.attention(q, k, v, select=value, grid=(5, -1)),
        kvt_compile.attention(q, k, v, select=str(value), grid=GRID),
    )


def test_without_a_grid_tokens_are_one_axis() -> None:
    q, k, v = qkv(20)
    near = (torch.arange(20)[:, None] - torch.arange(20)).abs() <= 2
    near |= torch.zeros_like(near).index_fill(1, torch.arange(5), True) & (torch.arange(20)[:, None] < 2)
    near |= torch.zeros_like(near).index_fill(1, torch.arange(15, 20), True) & (torch.arange(20)[:, None] >= 18)
    expected = F.scaled_dot_product_attention(q, k, v, near)
    torch.testing.assert_close(kvt_compile.attention(q, k, v, select="window(5)"), expected)


def test_ties_at_the_border_go_to_the_smaller_index() -> None:
    q = k = torch.ones(1, 1, 6, 2)
    v = torch.eye(6)[None, None]
    out = kvt_compile.attention(q, k, v, select="topk(2, ties=lowest)")
    assert (out != 0).tolist() == [[[[True, True, False, False, False, False]] * 6]]
    assert (kvt_compile.attention(q, k, v, select="topk(2)") != 0).all()


@pytest.mark.parametrize(
    ("text", "score", "kept"),
    [
        ("window(3) & topk(2, ties=lowest)", "s", [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4], [3, 4]]),
        ("(sinks(1) | window(3)) & topk(3, ties=lowest)", "s",
         [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 3, 4]]),
        ("topk(2, ties=lowest)", "where(le(j, i), s, -oo)", [[0], *[[0, 1]] * 5]),
        ("topk(2, ties=lowest)", "where(le(i, j), s, -oo)", [[n, n + 1] for n in range(5)] + [[5]]),
        ("topk(2, ties=lowest)", "where(lt(i, j), s, -oo)", [[n + 1, n + 2] for n in range(4)] + [[5], []]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lowering", ["aten", "reference"])
def test_ties_of_a_row_that_drops_nothing_else_but_masked_keys(
    text: str, score: str, kept: list[list[int]], lowering: str
) -> None:
    q = k = torch.ones(1, 1, 6, 2)
    v = torch.eye(6)[None, None].requires_grad_()
    whole, rank = for_node(select.parse(text))
    out = torch.ops.kvt.attention(q, k, v, [], score, "p", rank, [], 0.0, None, lowering, 0.0, None, whole, [6], 0)[0]
    assert [row.nonzero().flatten().tolist() for row in out[0, 0]] == kept
    weights = torch.zeros(6, 6)
    for i, row in enumerate(kept):
        weights[i, row] = 1 / max(len(row), 1)
    grad = torch.arange(36.0).view(1, 1, 6, 6)
    torch.testing.assert_close(torch.autograd.grad(out, v, grad)[0], weights.mT @ grad)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"select": "window(3)", "grid": (6, 6)}, "there are 37 queries"),
        ({"select": "window(3)", "grid": (-1, -1)}, "at most one axis of -1"),
        ({"select": "window(3)", "grid": (-1, 5)}, "do not divide"),
        ({"select": "window(3) | topk(3)"}, "comes last"),
    ],
)
def test_wrong_use_is_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        kvt_compile.attention(*qkv(), **keywords)  # type: ignore[arg-type]


def test_a_selection_is_no_number() -> None:
    with pytest.raises(TypeError, match="expected a selection or its text"):
        kvt_compile.attention(*qkv(), select=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["window(3) | prefix", "regions(3, 2) | prefix"])
def test_the_operator_is_sound(text: str) -> None:
    torch.library.opcheck(torch.ops.kvt.attention.default, arguments(CASE.but(select=text), "auto"))


def test_transforms_see_the_selection() -> None:
    q, k, v = (x.detach() for x in qkv())

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvt_compile.attention(q, k, v, select="window(3) | prefix", grid=GRID, prefix=PREFIX).square().sum()

    expected = torch.autograd.grad(loss(q.requires_grad_(), k, v), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q.detach(), k, v), expected)
    each = torch.func.vmap(torch.func.grad(loss))(q.detach()[:, None], k[:, None], v[:, None])
    torch.testing.assert_close(each.squeeze(1), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported_with_a_grid_known_only_at_run_time() -> None:
    def run(image: Tensor) -> Tensor:
        *_, height, width = image.shape
        tokens = image.flatten(2).transpose(1, 2)[:, None]
        return kvt_compile.attention(tokens, tokens, tokens, select="window(3)", grid=(height, width))

    compiled = torch.compile(run, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((4, 5), (6, 7), (8, 3)):
        image = torch.randn(2, 8, *size)
        torch.testing.assert_close(compiled(image), run(image))


VALUE = select.window(3) & select.topk(4)


def test_a_value_goes_through_dynamo() -> None:
    def run(x: Tensor) -> Tensor:
        return kvt_compile.attention(x, x, x, select=VALUE, grid=(4, 5))

    x = torch.randn(1, 20, 8)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_programs_saved_without_a_selection_still_load() -> None:
    q, k, v = qkv()
    plain = (q, k, v, [], "s", "p", 3, [], 0.0, None, "auto")
    assert torch.equal(torch.ops.kvt.attention(*plain)[0], torch.ops.kvt.attention(*plain, 0.0, None, "", None, 0)[0])


@pytest.mark.parametrize("lowering", ["c", "aten"])
def test_a_text_that_says_no_more_than_topk_is_topk(lowering: str) -> None:
    q, k, v = (x.detach() for x in qkv(9))
    plain = (q, k, v, [], "s", "p", 3, [], 0.0, None, lowering)
    for text in ("topk(1.0)", "topk(5)"):
        mine = torch.ops.kvt.attention(*plain, 0.0, None, text, None, 0)[0]
        assert torch.equal(mine, torch.ops.kvt.attention(*plain)[0])


def test_a_saved_program_cannot_say_what_is_no_selection() -> None:
    q, k, v = qkv()
    for text, grid, message in (
        ("eval(1)", [5, 7], "no selector"),
        ("window(3) | prefix", [5, 8], "as many queries and keys"),
        ("window(3) | prefix", [-5, -7], "at least 1 token"),
        ("window(3) | prefix", None, "needs a grid"),
    ):
        with pytest.raises(SelectionError, match=message):
            torch.ops.kvt.attention(q, k, v, [], "s", "p", 3, [], 0.0, None, "auto", 0.0, None, text, grid, 2)


@pytest.mark.parametrize("text", ["window(4) | prefix", "regions(3, (2, 2)) | prefix"])
def test_lists_lie_on_the_cpu_whatever_the_default_device_is(text: str) -> None:
    q, k, v = qkv(dtype=torch.float32)
    with torch.device("meta"):
        found = kvt_compile.attention(q, k, v, select=text, grid=GRID, prefix=PREFIX, lowering="c")
        gradient = torch.autograd.grad(found.square().sum(), q)[0]
    expected = kvt_compile.attention(q, k, v, select=text, grid=GRID, prefix=PREFIX, lowering="aten")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), q)[0])
