"""The ATen lowering against the float64 reference: outputs, kept keys, gradients, special values, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import Case, assert_close, assert_matches_reference, call, kept_by, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.plain import select, tiling
from kvt_compile.kernels.plain.aten import LOWERING

INF, NAN = math.inf, math.nan


def per_head(case: Case) -> list[Tensor]:
    return [torch.rand(case.heads) + 0.5]


def bias(case: Case) -> list[Tensor]:
    return [torch.randn(case.heads, case.queries, case.keys)]


def half_bias(case: Case) -> list[Tensor]:
    return [torch.randn(case.heads, case.queries, case.keys, dtype=torch.bfloat16)]


def batch_bias(case: Case) -> list[Tensor]:
    return [torch.randn(case.batch, case.keys)]


def keep_mask(case: Case) -> list[Tensor]:
    return [torch.rand(case.batch, case.queries, case.keys) > 0.4]


def table(case: Case) -> list[Tensor]:
    return [torch.randn(case.queries + case.keys, case.heads)]


def windows(case: Case) -> list[Tensor]:
    return [torch.randn(2, case.queries, case.keys)]


CASES = [
    Case("plain"),
    Case("scores as they are", score="s"),
    Case("cross attention", queries=5, keys=29, value_dim=3),
    Case("more queries than keys", queries=29, keys=5, topk=2),
    Case("gqa", heads=6, kv_heads=2),
    Case("mqa", heads=3, kv_heads=1),
    Case("k = 1", topk=1),
    Case("k = N", topk=17),
    Case("k > N", topk=1000),
    Case("one key", keys=1, topk=1),
    Case("one query", queries=1),
    Case("wide heads", head_dim=256, value_dim=40),
    Case("head of one", head_dim=1, value_dim=1),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("float64", dtype=torch.float64),
    Case("bfloat16 scores, float32 values", dtype=torch.bfloat16, value_dtype=torch.float32),
    Case("float32 scores, float64 values", value_dtype=torch.float64),
    Case("float64 scores, float32 values", dtype=torch.float64, value_dtype=torch.float32),
    Case("scale per head", score="s*c0[h]", captured=per_head),
    Case("bias", score="0.35*s + c0[h, i, j]", captured=bias),
    Case("bfloat16 bias", score="0.35*s + c0[h, i, j]", captured=half_bias),
    Case("broadcast bias", score="0.35*s + c0[b, j]", captured=batch_bias),
    Case("bool mask", score="where(c0[b, i, j], 0.35*s, -oo)", captured=keep_mask),
    Case("causal", score="where(le(j, i), 0.35*s, -oo)", keys=13),
    Case("soft cap", score="2.0*tanh(0.2*s)"),
    Case("table by distance", score="0.35*s + c0[i - j + 16, h]", captured=table),
    Case("window mask", score="0.35*s + c0[b % 2, i, j]", captured=windows, batch=4),
    Case("index by division", score="0.35*s + c0[b // n0, i, j]", captured=windows, batch=4, sizes=(2,)),
    Case("alibi", score="0.35*s - c0[h]*abs(i - j)", captured=per_head),
    Case("two loads of one tensor", score="0.35*s + c0[i, h] + c0[j, h]", captured=table),
    Case("gate", weight="p*c0[h]", captured=per_head),
    Case("curved weight", weight="p**2*c0[h]", captured=per_head, topk=4),
    Case("score and weight", score="s*c0[h]", weight="p*c0[h]", captured=per_head),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "aten")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tiling.Tile]:
    """Budget of a few rows, so that every loop of the plan runs; the tiles that were used."""
    monkeypatch.setattr(tiling, "CPU_BUDGET", 32)
    used: list[tiling.Tile] = []
    original = tiling.Heads.tiles

    def spy(self: tiling.Heads) -> Iterator[tiling.Tile]:
        for part in original(self):
            used.append(part)
            yield part

    monkeypatch.setattr(tiling.Heads, "tiles", spy)
    return used


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference_in_small_tiles(case: Case, small_tiles: list[tiling.Tile]) -> None:
    assert_matches_reference(case, "aten")
    assert len({(part.b, part.hk, part.i) for part in small_tiles}) > 1


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 10, 7), (1, 1, 1, 1, 1), (5, 6, 6, 3, 100_000), (2, 12, 1, 700, 9), (64, 3, 3, 4, 4)],
    ids=str,
)
def test_the_plan_covers_every_score_once_within_budget(shape: tuple[int, int, int, int, int]) -> None:
    batch, heads, kv_heads, queries, keys = shape
    seen = torch.zeros(batch, heads, queries, dtype=torch.int64)
    for piece in tiling.plan(*shape, "cpu"):
        for part in piece.tiles():
            part.rows(seen).add_(1)
            rows = len(part.b) * len(part.hq) * len(part.i)
            assert rows * keys <= tiling.CPU_BUDGET or rows == heads // kv_heads
            assert len(part.i) <= tiling.MAX_ROWS
    assert (seen == 1).all()


# --- ties -------------------------------------------------------------------------------------------------------------


def integers(case: Case, low: int, high: int) -> list[Tensor]:
    """q, k with small integers: scores are exact in every dtype, so that ties are ties everywhere."""
    torch.manual_seed(case.seed)
    q = torch.randint(low, high, (case.batch, case.heads, case.queries, case.head_dim)).to(case.dtype)
    k = torch.randint(low, high, (case.batch, case.heads, case.keys, case.head_dim)).to(case.dtype)
    return [q, k, torch.randn(case.batch, case.heads, case.keys, case.value_dim).to(case.dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("low", "high"), [(1, 2), (0, 2), (-1, 2), (-3, 4)], ids=["constant", "0 1", "-1 0 1", "-3..3"]
)
@pytest.mark.parametrize("topk", [1, 4, 9, 16, 17])
def test_ties_are_all_kept(dtype: torch.dtype, low: int, high: int, topk: int) -> None:
    case = Case("ties", dtype=dtype, topk=topk, score="s", head_dim=4)
    tensors = integers(case, low, high)
    expected = reference(case, tensors)
    kept = kept_by(case, "aten", tensors)
    assert torch.equal(kept, expected.kept)
    assert (kept.sum(-1) >= topk).all()
    if topk < 17 and high - low <= 3:
        assert (kept.sum(-1) > topk).any()  # there were ties


def test_kept_keys_follow_a_permutation_of_the_keys() -> None:
    case = Case("permuted", score="s", head_dim=4)
    q, k, v = integers(case, -1, 2)
    order = torch.randperm(case.keys)
    kept = kept_by(case, "aten", (q, k, v))
    assert torch.equal(kept_by(case, "aten", (q, k[:, :, order], v[:, :, order])), kept[..., order])


def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    case = Case("last bit", score="s", topk=2)
    row = torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0 + 2**-22])
    kept = kept_by(case, "aten", (torch.ones(1, 1, 1, 1), row.view(1, 1, 4, 1), torch.zeros(1, 1, 4, 1)))
    assert kept.flatten().tolist() == [False, True, False, True]


THRESHOLDS = {
    "midway": ([1.0, 4.0, 2.0, 3.0], 2, 2.5),
    "a tie still leaves a gap below": ([3.0, 3.0, 1.0, 3.0], 2, 2.0),
    "nothing between": ([1.0, 1.0 + 2**-23, 0.0], 1, 1.0 + 2**-23),
    "huge": ([3e38, -3e38, -3.2e38], 1, 0.0),
    "denormal": ([2**-149, 0.0, -1.0], 1, 2**-149),
    "all kept": ([3.0, 1.0], 2, -INF),
    "all valid kept": ([3.0, -INF, 1.0], 2, -INF),
    "nan": ([3.0, NAN, 1.0], 1, NAN),
    "inf": ([3.0, INF, 1.0], 1, NAN),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_threshold(name: str) -> None:
    row, topk, expected = THRESHOLDS[name]
    _, threshold = select.row_threshold(torch.tensor(row), topk)
    assert threshold.item() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_a_score_recomputed_with_an_ulp_of_error_keeps_the_same_keys() -> None:
    torch.manual_seed(0)
    t = torch.randn(200, 64)
    _, _, threshold = select.softmax(t, 20)
    kept = t >= threshold
    for direction in (INF, -INF):
        nudged = torch.nextafter(t, torch.tensor(direction))
        near = (t.sort(-1, descending=True).values[:, 19:21].diff(dim=-1).abs() < 1e-5).squeeze(-1)
        assert torch.equal((nudged >= threshold)[~near], kept[~near])
        assert near.float().mean() < 0.05


def test_the_backward_keeps_the_forward_s_keys(small_tiles: list[tiling.Tile]) -> None:
    """A key has a gradient exactly if the forward kept it: shown by dV of a sum, which is the column sum of weights."""
    case = Case("same keys", batch=1, heads=1, queries=64, keys=64, topk=20, value_dim=64)
    for seed in range(5):
        q, k, v, _ = case.but(seed=seed).tensors()
        kept = kept_by(case, "aten", (q, k, v))[0, 0]
        out = call(case, "aten", (q, k, v))[0]
        (dv,) = torch.autograd.grad(out, v, torch.eye(64).view(1, 1, 64, 64))  # dv[j, i] = p[i, j]
        assert torch.equal(dv[0, 0].T != 0, kept)
    assert small_tiles


# --- special values ---------------------------------------------------------------------------------------------------


def special(case: Case, **places: float) -> list[Tensor]:
    q, k, v, captured = (x if isinstance(x, list) else x.detach().clone() for x in case.tensors())
    for name, x in places.items():
        {"q": q, "k": k, "v": v}[name][0, 0, 1, 0] = x
    return [x.requires_grad_() for x in (q, k, v)] + captured


@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("x", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("topk", [3, 17])
def test_nan_and_inf_as_in_dense_attention(place: str, x: float, topk: int) -> None:
    case = Case("special", topk=topk)
    tensors = special(case, **{place: x})
    out = call(case, "aten", tensors)[0]
    exact = reference(case, tensors)
    assert torch.equal(out.isnan(), exact.out.isnan())
    if topk == 17:
        q, k, v = tensors
        dense = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        assert torch.equal(out.isnan(), dense.isnan())
        mine = torch.autograd.grad(out.sum(), tensors)
        for name, g, expected in zip("qkv", mine, torch.autograd.grad(dense.sum(), tensors), strict=True):
            assert torch.equal(g.isnan(), expected.isnan()), name
    assert_close("out", out.detach(), exact.out.detach(), reference(case, tensors, torch.float32).out.detach())


def test_nan_under_a_mask_that_selects_is_not_seen() -> None:
    case = Case("masked nan", score="where(c0[j], s, -oo)", captured=lambda case: [torch.arange(case.keys) != 1])
    tensors = special(case, k=NAN)
    out, logsumexp, _ = call(case, "aten", tensors)
    assert out.isfinite().all()
    assert logsumexp.isfinite().all()


def mask_with_an_empty_row(case: Case) -> list[Tensor]:
    """Row 3 may attend to nothing, row 4 to key 2 only."""
    keep = torch.rand(case.queries, case.keys) > 0.5
    keep[3] = False
    keep[4] = torch.arange(case.keys) == 2
    return [keep]


@pytest.mark.parametrize("topk", [1, 3, 17])
@pytest.mark.parametrize(
    "score", ["where(c0[i, j], s, -oo)", "s + where(c0[i, j], 0.0, -oo)", "s + log(where(c0[i, j], 1.0, 0.0))"]
)
def test_fully_masked_rows_are_zero_in_both_directions(topk: int, score: str) -> None:
    case = Case("masked rows", topk=topk, score=score, captured=mask_with_an_empty_row)
    q, k, v, captured = case.tensors()
    out, logsumexp, threshold = call(case, "aten", (q, k, v, *captured))
    assert (out[:, :, 3] == 0).all()
    assert (logsumexp[:, :, 3] == -INF).all()
    assert (threshold[:, :, 3:5] == -INF).all()
    torch.testing.assert_close(out[:, :, 4], v[:, :, 2])
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, 3] == 0).all()


@pytest.mark.parametrize("topk", [1, 3, 17])
def test_masked_rows_match_the_reference(topk: int) -> None:
    score = "where(c0[i, j], s, -oo)"
    assert_matches_reference(Case("masked rows", topk=topk, score=score, captured=mask_with_an_empty_row), "aten")


def test_denormal_scores_are_selected_by_their_value() -> None:
    row = torch.tensor([3e-40, 1e-40, 2e-40, -1e-40, 0.0])
    kept = kept_by(
        Case("denormal", score="s", topk=2),
        "aten",
        (torch.ones(1, 1, 1, 1), row.view(1, 1, 5, 1), torch.zeros(1, 1, 5, 1)),
    )
    assert kept.flatten().tolist() == [True, False, True, False, False]


def test_huge_scores_do_not_overflow_the_softmax() -> None:
    case = Case("huge", score="1e36*s", topk=3)
    q, k, v = (x.detach() for x in case.tensors()[:3])
    out = call(case, "aten", (q, k, v))[0]
    assert_close("out", out, reference(case, (q, k, v)).out, reference(case, (q, k, v), torch.float32).out)


EMPTY = [
    Case("no batch", batch=0),
    Case("no queries", queries=0),
    Case("no keys", keys=0),
    Case("no heads", heads=0),
    Case("no value features", value_dim=0),
    Case("no head features", head_dim=0),
]


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(case: Case, lowering: str) -> None:
    q, k, v, _ = case.tensors()
    out, logsumexp, threshold = call(case, lowering, (q, k, v))
    assert out.shape == (case.batch, case.heads, case.queries, case.value_dim)
    assert logsumexp.shape == threshold.shape == out.shape[:3]
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    if case.keys == 0:
        assert (out == 0).all()
        assert (logsumexp == -INF).all()


# --- layouts ----------------------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, NAN)), -1)[..., 0]


def feature_first(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(x: Tensor) -> Tensor:
    return torch.cat((torch.full_like(x[:, :, :1], NAN), x), 2)[:, :, 1:]


@pytest.mark.parametrize("layout", [transposed, interleaved, feature_first, sliced], ids=lambda f: f.__name__)
def test_any_strides(layout: Any) -> None:
    case = Case("strides", heads=4, kv_heads=2)
    tensors = [x.detach() for x in case.tensors()[:3]]
    strided = [layout(x).requires_grad_() for x in tensors]
    plain = [x.clone().requires_grad_() for x in tensors]
    out, expected = call(case, "aten", strided)[0], call(case, "aten", plain)[0]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    grad = layout(torch.randn_like(expected))
    for mine, theirs in zip(
        torch.autograd.grad(out, strided, grad), torch.autograd.grad(expected, plain, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_expanded_inputs_and_gradient() -> None:
    case = Case("expanded", batch=3)
    q, k, v = (x.detach()[:1].expand(3, -1, -1, -1) for x in case.tensors()[:3])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expanded = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
    assert expanded[0].stride(0) == 0
    gradients = torch.autograd.grad(call(case, "aten", expanded)[0].sum(), expanded)  # .sum(): a stride-0 gradient
    expected = torch.autograd.grad(call(case, "aten", leaves)[0], leaves, torch.ones(3, 2, 13, 8))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- gradients --------------------------------------------------------------------------------------------------------

SMALL = Case("small", dtype=torch.float64, queries=4, keys=5, topk=3, head_dim=3, value_dim=2)


def doubles(*shapes: tuple[int, ...]) -> Any:
    return lambda case: [torch.randn(shape, dtype=torch.float64) for shape in shapes]


GRADCHECKS = [
    SMALL,
    SMALL.but(id="per-head scale", score="s*c0[h]", captured=doubles((2,))),
    SMALL.but(id="bias", score="s + c0[h, i, j]", captured=doubles((2, 4, 5))),
    SMALL.but(id="broadcast bias", score="s + c0[j] + c1", captured=doubles((5,), ())),
    SMALL.but(id="general index", score="s + c0[b % 4, i // 2, j]", captured=doubles((4, 2, 5)), batch=5, heads=1),
    SMALL.but(id="soft cap", score="c0*tanh(s/c0)", captured=doubles(())),
    SMALL.but(id="where", score="where(lt(s, 0.3), s*c0[h], s**2)", captured=doubles((2,))),
    SMALL.but(id="masked", score="where(le(j, i), s, -oo) + c0[h, i, j]", captured=doubles((2, 4, 5))),
    SMALL.but(id="gqa", heads=4, kv_heads=2, score="s*c0[h]", captured=doubles((4,))),
    SMALL.but(id="weight", weight="p*c0[h, i]*(1.0 + p)", captured=doubles((2, 4))),
    SMALL.but(id="dropout", dropout_p=0.3, score="s*c0[h]", weight="p*c0[h]", captured=doubles((2,))),
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck(case: Case) -> None:
    q, k, v, captured = case.tensors()
    assert torch.autograd.gradcheck(lambda *x: call(case, "aten", x)[0], (q, k, v, *captured))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "c", "qc", "kv"])
def test_only_the_needed_gradients(wanted: str) -> None:
    case = Case("some", score="s*c0[h]", captured=per_head)
    q, k, v, (c,) = case.tensors()
    named = dict(zip("qkvc", (q, k, v, c), strict=True))
    every = dict(zip("qkvc", torch.autograd.grad(call(case, "aten", (q, k, v, c))[0].sum(), (q, k, v, c)), strict=True))
    some = {n: x.detach().requires_grad_(n in wanted) for n, x in named.items()}
    out = call(case, "aten", tuple(some.values()))[0]
    for name, gradient in zip(wanted, torch.autograd.grad(out.sum(), [some[n] for n in wanted]), strict=True):
        torch.testing.assert_close(gradient, every[name])


def test_sums_over_tiles_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """dv of a constant gradient is a sum of many equal terms: it would stop growing at 256 in bfloat16."""
    monkeypatch.setattr(tiling, "MAX_ROWS", 1)
    case = Case("sums", batch=1, heads=1, queries=1024, keys=1, topk=1, dtype=torch.bfloat16, value_dim=1, head_dim=1)
    q, k, v, _ = case.tensors()
    (dv,) = torch.autograd.grad(call(case, "aten", (q, k, v))[0].sum(), v)
    assert dv.item() == 1024


@pytest.mark.parametrize("lowering", ["aten", "c"])
@pytest.mark.parametrize("score", ["s + log(c0[i, j])", "s - 1.0/c0[i, j]"])
def test_an_infinite_slope_where_a_key_is_dropped_is_not_seen(score: str, lowering: str) -> None:
    """In eager code it is: 0 * inf is NaN."""

    def prior(case: Case) -> list[Tensor]:
        c = torch.rand(case.queries, case.keys) + 0.5
        c[:, 3] = 0.0
        return [c]

    case = Case("prior", score=score, captured=prior)
    q, k, v, (c,) = case.tensors()
    gradients = torch.autograd.grad(call(case, lowering, (q, k, v, c))[0].square().sum(), (q, k, v, c))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[3][:, 3] == 0).all()


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements any operator's result had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("n", [2048, 4096])
def test_memory_grows_with_n_not_with_n_squared(n: int) -> None:
    """Called below the operator: a dispatch mode does not see inside one."""
    q, k, v = torch.randn(3, 1, 1, n, 8).unbind()
    call = AttentionCall(KernelSpec.of(q, k, v, needs_grad=(True, True, True)), q, k, v, [], n // 2)
    with Largest() as forward:
        out, logsumexp, threshold = LOWERING.forward(call)
    with Largest() as backward:
        LOWERING.backward(call, out, out, logsumexp, threshold)
    limit = max(tiling.CPU_BUDGET, n * 8)
    assert forward.numel <= limit < n * n
    assert backward.numel <= limit


# --- topk_softmax -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_topk_softmax(lowering: str, dim: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 7, 8, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.ops.kvt.topk_softmax(scores, dim, 3, out_dtype, lowering)
    grad = torch.randn(6, 7, 8, dtype=torch.float64).to(out_dtype)

    def by_reference(wide: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = scores.detach().to(wide).requires_grad_()
        tau = leaf.detach().movedim(dim, -1).sort(-1, descending=True).values[..., 2:3].movedim(-1, dim)
        result = leaf.masked_fill(leaf < tau, -INF).softmax(dim)
        return result.detach(), torch.autograd.grad(result, leaf, grad.to(wide))[0]

    exact, plain = by_reference(torch.float64), by_reference(torch.promote_types(dtype, torch.float32))
    assert torch.equal(weights != 0, exact[0] != 0)
    assert_close("weights", weights.detach(), exact[0], plain[0].to(out_dtype))
    (gradient,) = torch.autograd.grad(weights, scores, grad)
    # the backward starts from the rounded weights, as torch's softmax does
    rounded = plain[0].to(out_dtype).double()
    eager = (rounded * (grad.double() - (rounded * grad.double()).sum(dim, keepdim=True))).to(dtype)
    assert_close("gradient", gradient, exact[1], eager)


@pytest.mark.parametrize("lowering", ["aten", "reference"])
def test_topk_softmax_special_rows(lowering: str) -> None:
    rows = torch.tensor([[1.0, NAN, 0.0], [-INF, -INF, -INF], [INF, 0.0, 1.0], [2.0, 2.0, 1.0], [-INF, 1.0, -INF]])
    weights = torch.ops.kvt.topk_softmax(rows, -1, 1, torch.float32, lowering)
    assert weights[0].isnan().all()
    assert weights[2].isnan().all()
    assert weights[[1, 3, 4]].tolist() == [[0, 0, 0], [0.5, 0.5, 0], [0, 1, 0]]


@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize(("shape", "dim"), [((), 0), ((), -1), ((0, 4), 1), ((4, 0), 1), ((1,), 0)], ids=str)
def test_topk_softmax_small_shapes(lowering: str, shape: tuple[int, ...], dim: int) -> None:
    scores = torch.zeros(shape, requires_grad=True)
    weights = torch.ops.kvt.topk_softmax(scores, dim, 2, torch.float32, lowering)
    assert torch.equal(weights, torch.ones(shape))
    (gradient,) = torch.autograd.grad(weights.sum(), scores)
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("lowering", ["aten", "c"])
def test_a_row_masked_by_a_large_finite_number_has_the_gradient_of_a_mean(lowering: str) -> None:
    """logsumexp = -1e9 + log(n) rounds to -1e9 in float32; the backward must not lose the log(n)."""
    q, k, v = (torch.randn(1, 1, n, 8).requires_grad_() for n in (3, 5, 5))
    mask = torch.zeros(1, 1, 3, 1, dtype=torch.bool)
    mask[0, 0, 1] = True
    out = torch.ops.kvt.attention(q, k, v, [mask], "where(c0[0, 0, i, 0], -1e9, s)", "p", 5, [], 0.0, None, lowering)[0]
    out[0, 0, 1].sum().backward()
    torch.testing.assert_close(v.grad, torch.full_like(v, 0.2))
