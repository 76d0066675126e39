"""topk_tolerance: what it allows, that it reaches the lowering on every way in, and that a backward follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import Case, assert_within_tolerance
from torch import Tensor, nn

import kvt_compile
from kvt_compile.config import Options, make_options
from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.plain.aten import AtenLowering
from kvt_compile.kernels.plain.reference import reference_softmax, within_tolerance
from kvt_compile.topk import kept_range, validate_tolerance

kvt = torch.ops.kvt
INF = math.inf


class Loose(AtenLowering):
    """Keeps as many keys as it may, and `extra` more, which it may not."""

    name = "loose"

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra
        self.asked: list[float] = []

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append(call.tolerance)
        return super().forward(replace(call, topk=kept_range(call.topk, call.tolerance)[1] + self.extra))

    def softmax(self, scores: Tensor, dim: int, topk: int, dtype: torch.dtype, tolerance: float = 0.0) -> Tensor:
        self.asked.append(tolerance)
        return super().softmax(scores, dim, kept_range(topk, tolerance)[1], dtype)


@pytest.fixture
def loose() -> Iterator[Loose]:
    lowering = Loose()
    undo = lowerings.register("loose", lowering)
    yield lowering
    undo()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topk", "tolerance", "expected"),
    [
        (100, 0.0, (100, 100)),
        (100, 0.02, (98, 102)),
        (99, 0.02, (98, 100)),
        (50, 0.02, (49, 51)),
        (49, 0.02, (49, 49)),
        (100, 0.07, (93, 107)),  # 100 * (1 + 0.07) is 106.99999999999999... in some orders of floats
        (100, 0.29, (71, 129)),  # 100 * 0.29 is 28.999999999999996
        (1, 0.999, (1, 1)),
        (3, 0.999, (1, 5)),
    ],
)
def test_kept_range(topk: int, tolerance: float, expected: tuple[int, int]) -> None:
    assert kept_range(topk, tolerance) == expected


@pytest.mark.parametrize("given", [0, 0.0, 0.02, 0.999])
def test_option_is_a_float(given: float) -> None:
    chosen = make_options({"topk_tolerance": given}).topk_tolerance
    assert (chosen, type(chosen)) == (given, float)
    assert Options().topk_tolerance == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.0, r"topk_tolerance is 1.0, expected a number in \[0, 1\); for 1 % write 0.01"),
        (2, r"expected a number in \[0, 1\); for 2 % write 0.02"),
        (-0.1, r"topk_tolerance is -0.1, expected a number in \[0, 1\)$"),
        (math.nan, r"topk_tolerance is nan"),
        (True, r"topk_tolerance is True \(bool\)"),
        ("0.02", r"topk_tolerance is '0.02' \(str\)"),
        (None, r"topk_tolerance is None \(NoneType\)"),
    ],
    ids=str,
)
def test_bad_values_are_named(given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        validate_tolerance(given)
    with pytest.raises(kvt_compile.OptionError, match=message):
        make_options({"topk_tolerance": given})
    if isinstance(given, float):
        x = torch.randn(1, 1, 3, 4)
        with pytest.raises(ValueError, match=r"kvt::attention: tolerance is .*, expected a number in \[0, 1\)"):
            kvt.attention(x, x, x, [], "s", "p", 2, [], 0.0, None, "aten", given)
        with pytest.raises(ValueError, match=r"kvt::topk_softmax: tolerance is"):
            kvt.topk_softmax(x, -1, 2, torch.float32, "aten", given)
        with pytest.raises(ValueError, match=message):
            kvt_compile.topk_attention(x, x, x, topk=2, topk_tolerance=given)


# --- what is allowed --------------------------------------------------------------------------------------------------

ROW = [5.0, 4.0, 3.0, 3.0, 3.0, 2.0, 1.0, 0.0, -1.0, -INF]


@pytest.mark.parametrize(
    ("kept", "topk", "tolerance", "allowed"),
    [
        ([0, 1], 2, 0.0, True),
        ([0], 2, 0.0, False),
        ([0], 2, 0.5, True),
        ([1], 2, 0.5, False),  # not the largest
        ([0, 1, 2, 3, 4], 3, 0.0, True),  # all ties at the threshold
        ([0, 1, 2], 3, 0.0, False),  # some of them
        ([0, 1, 2, 3, 4], 2, 0.5, True),  # k' = 3 is allowed, and its ties come with it
        ([0, 1, 2, 3, 4], 2, 0.4, False),  # only k' = 2 is
        ([0, 1, 2, 3, 4, 5], 5, 0.2, True),
        ([0, 1, 2, 3, 4, 5, 6], 5, 0.2, False),
        ([*range(9)], 9, 0.0, True),
        ([*range(9)], 10, 0.0, True),  # fewer valid keys than k
        ([*range(8)], 10, 0.1, False),  # no row need lose a key for that
        ([*range(10)], 10, 0.0, False),  # -inf is never kept
    ],
)
def test_which_sets_a_tolerance_allows(kept: list[int], topk: int, tolerance: float, allowed: bool) -> None:
    mask = torch.zeros(len(ROW), dtype=torch.bool)
    mask[kept] = True
    order = torch.randperm(len(ROW))
    t = torch.tensor(ROW, dtype=torch.float64)
    assert within_tolerance(t[order], mask[order], topk, tolerance).item() is allowed


def test_rows_without_keys_and_broken_rows() -> None:
    t = torch.tensor([[-INF, -INF], [math.nan, 1.0], [INF, 1.0]], dtype=torch.float64)
    assert (
        within_tolerance(t, torch.tensor([[False, False], [True, True], [True, True]]), 1, 0.1).tolist() == [True] * 3
    )
    assert not within_tolerance(t, torch.tensor([[True, False]] * 3), 1, 0.1)[0]


def test_the_exact_selection_is_always_allowed() -> None:
    t = torch.randn(50, 40, dtype=torch.float64).mul(4).round().div(4)  # many ties
    for tolerance in (0.0, 0.02, 0.3):
        assert within_tolerance(t, reference_softmax(t, 13)[3], 13, tolerance).all()


@pytest.mark.parametrize("lowering", ["aten", "c", "reference", "loose"])
def test_lowerings_keep_what_is_allowed(lowering: str, loose: Loose) -> None:
    assert_within_tolerance(Case("loose", keys=40, topk=20, tolerance=0.1), lowering)


def test_one_key_too_many_is_noticed() -> None:
    undo = lowerings.register("loose", Loose(extra=1))
    try:
        with pytest.raises(AssertionError, match=r"rows keep what a tolerance of 0\.1 does not allow"):
            assert_within_tolerance(Case("one more", keys=40, topk=20, tolerance=0.1), "loose")
    finally:
        undo()


# --- every way to the lowering: 10 keys at 0.2 are 12 for one that keeps as many as it may ----------------------------


def qkv(*lead: int) -> list[Tensor]:
    return [torch.randn(*lead, 7 + 13 * (n > 0), 8, requires_grad=True) for n in range(3)]


def same(run: Callable[[int, float], Tensor], leaves: Sequence[Tensor], loose: Loose) -> None:
    """k = 10 with tolerance 0.2 gives what k = 12 gives exactly, outputs and gradients."""
    for mine, theirs in zip(_results(run(10, 0.2), leaves), _results(run(12, 0.0), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert 0.2 in loose.asked


def _results(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out.square().sum(), list(leaves))]


def test_op_and_its_gradients(loose: Loose) -> None:
    q, k, v = qkv(2, 3)
    bias = torch.randn(3, requires_grad=True)
    same(
        lambda n, t: kvt.attention(q, k, v, [bias], "s*c0[h]", "p", n, [], 0.0, None, "loose", t)[0],
        [q, k, v, bias],
        loose,
    )


def test_softmax_op(loose: Loose) -> None:
    scores = torch.randn(4, 20, requires_grad=True)
    same(lambda n, t: kvt.topk_softmax(scores, -1, n, torch.float32, "loose", t), [scores], loose)


@pytest.mark.parametrize("dynamic", [None, True], ids=["eager", "compiled, dynamic"])
def test_topk_attention(loose: Loose, dynamic: bool | None) -> None:
    q, k, v = qkv(2, 3)

    def run(n: int, t: float) -> Tensor:
        return kvt_compile.topk_attention(q, k, v, topk=n, topk_tolerance=t, lowering="loose")

    same(run if dynamic is None else torch.compile(run, backend="aot_eager", dynamic=dynamic), [q, k, v], loose)


def test_transforms(loose: Loose) -> None:
    q, k, v = (x.detach() for x in qkv(4, 2, 3))

    def gradient(n: int, t: float) -> Tensor:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kvt_compile.topk_attention(q, k, v, topk=n, topk_tolerance=t, lowering="loose").square().sum()

        return torch.vmap(torch.func.grad(loss))(q, k, v)

    torch.testing.assert_close(gradient(10, 0.2), gradient(12, 0.0), rtol=0, atol=0)
    folded = torch.vmap(lambda x: kvt.attention(x, k[0], v[0], [], "s", "p", 10, [], 0.0, None, "loose", 0.2)[0])(q)
    each = [kvt.attention(x, k[0], v[0], [], "s", "p", 12, [], 0.0, None, "loose")[0] for x in q]
    torch.testing.assert_close(folded, torch.stack(each))
    assert 0.2 in loose.asked


class Net(nn.Module):
    def __init__(self, keeps_scores: bool) -> None:
        super().__init__()
        self.keeps_scores = keeps_scores

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return (weights.flip(1) if self.keeps_scores else weights) @ v


@pytest.mark.parametrize("keeps_scores", [False, True], ids=["fused", "scores-kept"])
@pytest.mark.parametrize("way", ["backend", "rewrite"])
def test_option_reaches_the_lowering(loose: Loose, keeps_scores: bool, way: str) -> None:
    q, k, v = (x.detach().requires_grad_() for x in qkv(2, 3))
    net = Net(keeps_scores)

    def run(n: int, t: float) -> Tensor:
        options = {"topk": n, "topk_tolerance": t, "lowering": "loose"}
        if way == "rewrite":
            return kvt_compile.rewrite(net, q, k, v, **options).module(q, k, v)
        torch.compiler.reset()
        compiled = torch.compile(net, backend="kvt", options=options)
        return compiled(q, k, v)

    same(run, [q, k, v], loose)
