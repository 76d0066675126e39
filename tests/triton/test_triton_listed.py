"""Triton kernels with lists of tiles, in Triton's interpreter, against the reference's boolean map: outputs, kept keys,
gradients.  What the lists say is in tests/select/test_tiles.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from interpreted import NAME, Recorder, triton_on_cpu
from oracles import Case, assert_matches_reference, call, floats
from selected_cases import CASES

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.tiles import refusal
from kvt_compile.kernels.triton.lowering import LOWERING

pytest.importorskip("triton")
# 3 tiles of at most 16 queries, the token before the grid in one of its own; an interpreted tile takes 50 ms
SMALL = Case("small", batch=1, heads=2, kv_heads=1, queries=21, keys=21, topk=21, head_dim=4, value_dim=4, grid=(4, 5),
             prefix=1, select="window(3) | prefix")  # fmt: skip
ONE = SMALL.but(heads=1)
LISTED = [
    SMALL.but(id="bias with a gradient", score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys")),
    ONE.but(id="ranked", topk=4, dropout_p=0.3),
    SMALL.but(id="heads that differ, causal", select="shifted(2)", kv_heads=2, grid=(18,), prefix=0, queries=18,
              keys=18, score="where(le(j, i), 0.35*s, -oo)", dtype=torch.bfloat16),
    ONE.but(id="no bits", select="halo((4, 3), (0, 1)) | prefix", dtype=torch.float64),
    ONE.but(id="no multiple of p", weight="p*c0[i]*(1.0 + p)", captured=floats("queries"), grid=(12,), prefix=0,
            select="window(3, dilation=2, causal=True) | sinks(2)", queries=12, keys=12),
    SMALL.but(id="regions", select="regions(1, (4, 3)) | prefix"),
    ONE.but(id="ranked in regions", select="regions(0.5, 8, heads=all)", grid=(19,), prefix=0, queries=19, keys=19,
            topk=3),
    SMALL.but(id="keys", select="keys(5)"),
    SMALL.but(id="keys that query heads do not share", select="keys(6, by=mean_query) & (window(3) | prefix)",
              dtype=torch.bfloat16),
    SMALL.but(id="heads", select="heads(1) & (window(3) | keys(4)) | prefix", batch=2, topk=4),
    ONE.but(id="regions, and a window", select="regions(1, (2, 3)) | window(3) | prefix",
            score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys"), dropout_p=0.3),
    SMALL.but(id="heads that differ, regions of all", select="regions(0.3, 4, heads=all) & shifted(2) | sinks(1)",
              kv_heads=2, grid=(18,), prefix=0, queries=18, keys=18, dtype=torch.float64),
    ONE.but(id="no row keeps a key", select="sinks(2) & window(2)", grid=(9,), prefix=0, queries=9, keys=9),
    ONE.but(id="other keys than queries", select="sinks(5)", queries=7, grid=None, prefix=0),
]  # fmt: skip


@pytest.fixture
def interpreted() -> Iterator[Recorder]:
    with warnings.catch_warnings(), triton_on_cpu("streaming") as recorder:
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of the infinities that a GPU computes without a word
        yield recorder


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_it_matches_the_reference(case: Case, interpreted: Recorder) -> None:
    assert_matches_reference(case, NAME)
    assert {"forward", "backward_rows", "backward_q", "backward_kv"} <= set(interpreted.asked)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not refusal(case.select)], ids=str)
def test_larger_ones_match_the_reference(case: Case, interpreted: Recorder) -> None:
    assert_matches_reference(case, NAME)


def test_what_keeps_every_key_is_dense(interpreted: Recorder) -> None:
    case = ONE.but(select="window(9) | prefix")
    leaves = case.tensors()[:3]
    mine = call(case, NAME, leaves)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=0.35355339059327373)
    torch.testing.assert_close(mine, dense)
    grad = torch.randn_like(dense)
    for one, other in zip(*(torch.autograd.grad(x, leaves, grad) for x in (mine, dense)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_score_of_nan_and_an_infinite_one_make_their_rows_nan_and_no_others(interpreted: Recorder) -> None:
    for x in (float("nan"), float("inf")):
        q, k, v = (y.detach() for y in ONE.tensors()[:3])
        q[0, 0, 9] = x
        out, logsumexp, threshold = call(ONE, NAME, (q, k, v))
        expected = torch.zeros(1, 1, 21, dtype=torch.bool)
        expected[0, 0, 9] = True
        assert torch.equal(threshold.isnan(), expected)
        assert torch.equal(logsumexp.isnan(), expected)
        assert torch.equal(out.isnan().any(-1), expected)


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("window(3) | prefix", None),
        ("regions(2, 3) | prefix", None),
        ("(window(3) | prefix) & mass(0.5)", "mass"),
        ("topk(1.0, ties=lowest)", "ties=lowest"),
        ("regions(2, 3) | window(3) | prefix", None),
        ("keys(8)", None),
        ("heads(0.5) & window(3)", None),
        (" | ".join(f"window({n}) & keys({n})" for n in range(2, 32)), "tokens, expected at most"),
    ],
)
def test_a_gpu_runs_it_or_says_why_not(select: str, reason: str | None) -> None:
    spec = KernelSpec("float32", "float32", 8, 8, select=select)
    assert lowerings.choose("auto", spec, "cuda").name == ("aten" if reason else "triton")
    if reason:
        assert reason in (LOWERING.supports(spec) or "")
