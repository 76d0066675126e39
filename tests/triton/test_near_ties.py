"""The oracle of the GPU tests: which rows rounding may decide, and that nothing else is forgiven."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from gpu_cases import LARGE, PLAIN
from near_ties import near_ties
from oracles import assert_matches_reference, kept_by, reference
from torch import Tensor

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.plain.aten import AtenLowering
from kvt_compile.kernels.plain.reference import reference_scores

EPS = torch.finfo(torch.float32).eps
CASE = PLAIN.but(id="near-ties", queries=30, keys=40, topk=11, head_dim=16)


@contextmanager
def lowering(change: Callable[[AttentionCall], AttentionCall]) -> Iterator[str]:
    """ATen's, of a changed call: another unit's rounding, or a fault."""

    class Changed(AtenLowering):
        def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(change(call))

    undo = lowerings.register("changed", Changed())
    try:
        yield "changed"
    finally:
        undo()


def rounding(size: float, seed: int = 0) -> Callable[[AttentionCall], AttentionCall]:
    """Keys that are off by so much of themselves: so is every product."""

    def change(call: AttentionCall) -> AttentionCall:
        noise = torch.empty(call.k.shape).uniform_(-size, size, generator=torch.Generator().manual_seed(seed))
        return replace(call, k=call.k * (1 + noise))

    return change


def planted(gap: float) -> tuple[list[Tensor], set[int]]:
    """q, k, v of CASE in which the k-th and the next score of row 0 differ by `gap`, and these two keys."""
    q, k, v = (x.detach() for x in CASE.tensors()[:3])
    order = (q.double() @ k.double().transpose(-1, -2))[0, 0, 0].argsort(descending=True)
    last, following = int(order[CASE.topk - 1]), int(order[CASE.topk])
    k[0, 0, following] = k[0, 0, last] - gap * q[0, 0, 0] / q[0, 0, 0].square().sum()
    return [q, k, v], {last, following}


class TestNearTies:
    def test_a_row_is_undecided_where_rounding_decides(self) -> None:
        for gap, undecided in ((1e-3, False), (1e-7, True), (0.0, True)):
            tensors, pair = planted(gap)
            found = near_ties(CASE, tensors)
            assert bool(found.undecided[0, 0, 0]) == undecided
            differ = found.may ^ found.must
            assert set(differ[0, 0, 0].nonzero().flatten().tolist()) == (pair if undecided else set())

    def test_of_a_decided_row_must_and_may_are_what_the_reference_keeps(self) -> None:
        for case in (CASE, CASE.but(score="where(le(j, i), 0.125*s, -oo)"), CASE.but(topk=40)):
            tensors = case.tensors()[:3]
            found, kept = near_ties(case, tensors), reference(case, tensors).kept
            assert not found.undecided.any()
            assert torch.equal(found.must, kept)
            assert torch.equal(found.may, kept)

    @pytest.mark.parametrize("slope", ["s", "3.0*s", "5.0*tanh(s)", "where(lt(j, 7), s, -oo)"])
    def test_the_slack_holds_what_another_order_of_sums_changes(self, slope: str) -> None:
        case = CASE.but(score=slope, head_dim=64)
        q, k, v, _ = case.tensors()
        slack = near_ties(case, (q, k, v)).slack
        exact, plain = (reference_scores(q, k, score=slope, dtype=x).detach() for x in (torch.float64, torch.float32))
        off = torch.where(exact.isfinite(), exact - plain, 0.0).abs().amax(-1)
        assert (off <= slack).all()
        assert off.max() > 0.0
        assert slack.max() < 1e-3 * exact[exact.isfinite()].abs().max()


class TestOracle:
    def test_roundings_are_forgiven(self) -> None:
        tensors, _ = planted(1e-6)
        ties, exact, forgiven = near_ties(CASE, tensors), reference(CASE, tensors).kept, 0
        for seed in range(10):
            with lowering(rounding(8 * EPS, seed)) as name:
                kept = kept_by(CASE, name, tensors)
                ties.check(kept)
                forgiven += int((kept != exact).sum())
        assert forgiven > 0
        with lowering(rounding(8e4 * EPS)) as name, pytest.raises(AssertionError, match="that no rounding may"):
            ties.check(kept_by(CASE, name, tensors))

    def test_a_lowering_without_fault_passes(self) -> None:
        for case in (next(x for x in LARGE if x.id == "dropout, gqa"), CASE):
            assert_matches_reference(case, "aten", rounding=True)

    @pytest.mark.parametrize(
        "fault",
        [
            pytest.param(rounding(1e-3), id="three digits"),
            pytest.param(lambda call: replace(call, topk=call.topk + 1), id="a key more"),
            pytest.param(lambda call: replace(call, topk=call.topk - 1), id="a key less"),
        ],
    )
    def test_a_fault_is_not(self, fault: Callable[[AttentionCall], AttentionCall]) -> None:
        case = CASE.but(queries=100, keys=300, topk=150)
        with lowering(fault) as name, pytest.raises(AssertionError):
            assert_matches_reference(case, name, rounding=True)

    def test_values_may_be_narrower_than_there_are_keys(self) -> None:
        case = CASE.but(keys=600, topk=300, queries=5)
        assert torch.equal(kept_by(case, "aten"), reference(case, case.tensors()[:3]).kept)
