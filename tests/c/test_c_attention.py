"""The generated C kernels against the float64 reference: outputs, kept keys, gradients, special values, layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import Case, assert_close, assert_matches_reference, call, kept_by, reference
from torch import Tensor

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.c import CLowering, Settings
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.op.spec import KernelSpec

INF, NAN = math.inf, math.nan
ZEROED = "where(ne(p, p), 0.0, p)"

# 17 values a head, like keys: reading off the kept keys with the identity as values needs no other kernel
CASE = Case("plain", value_dim=17)


def floats(*shape: str) -> Any:
    """A captured tensor with those of the case's sizes."""
    return lambda case: [torch.randn([getattr(case, x) for x in shape]) + 0.5]


def table(case: Case) -> list[Tensor]:
    index = torch.arange(case.queries)[:, None] - torch.arange(case.keys) + case.keys - 1
    return [torch.randn(case.queries + case.keys, case.heads), index]


def masks(case: Case) -> list[Tensor]:
    """Row 3 may attend to nothing, row 4 to key 2 only."""
    keep = torch.rand(2, case.queries, case.keys) > 0.4
    keep[:, 3] = False
    keep[:, 4] = torch.arange(case.keys) == 2
    return [keep, torch.randn(case.heads, case.queries, case.keys, dtype=torch.bfloat16)]


CASES = [
    CASE,
    CASE.but(id="one query", queries=1),
    *(CASE.but(id=f"{n} queries", queries=n, keys=2 * n + 4, value_dim=24) for n in (8, 16, 41, 49)),
    CASE.but(id="half a tile of everything", queries=39, keys=50, topk=9, value_dim=24, dropout_p=0.2,
             score="0.35*s + c0[h, i, j]", weight="p*c1[h, i]",
             captured=lambda case: [*floats("heads", "queries", "keys")(case), *floats("heads", "queries")(case)]),
    CASE.but(id="several tiles and blocks", queries=70, keys=200, topk=90, batch=1),
    CASE.but(id="gqa", heads=6, kv_heads=2),
    CASE.but(id="k = 1", topk=1),
    CASE.but(id="k = N", topk=17),
    CASE.but(id="bfloat16", dtype=torch.bfloat16),
    CASE.but(id="float16", dtype=torch.float16),
    CASE.but(id="float64", dtype=torch.float64),
    CASE.but(id="bfloat16 scores, float32 values", dtype=torch.bfloat16, value_dtype=torch.float32),
    CASE.but(id="wide heads", head_dim=256, value_dim=200),
    CASE.but(id="kept values in two column groups", head_dim=7, value_dim=136, keys=70, queries=40, topk=30),
    CASE.but(id="head of one", head_dim=1, value_dim=1),
    CASE.but(id="bias", score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys")),
    CASE.but(id="key bias", score="s*c0[j] + 1.0", captured=floats("keys")),
    CASE.but(id="scale per head", score="s*c0[h]", captured=floats("heads")),
    CASE.but(id="table through an index tensor", score="0.35*s + c0[c1[i, j], h]", captured=table),
    CASE.but(id="window mask and bias", score="where(c0[b % 2, i, j], 0.35*s, -oo) + c1[h, i, j]", captured=masks),
    CASE.but(id="causal", score="where(le(j, i), 0.35*s, -oo)"),
    CASE.but(id="soft cap", score="2.0*tanh(0.2*s)"),
    CASE.but(id="every function", score="where(lt(s, 0.3), maximum(s, -1.0)*sigmoid(s), exp(minimum(0.1*s, 2.0)))"
             " + 0.1*log(sqrt(s**2 + 1.0)) + sin(0.1*s)*cos(s) + erf(clamp(s, -2.0, 2.0)) + abs(0.1*s) + relu(s)"),
    CASE.but(id="gate", weight="p*c0[h, i]*(1.0 + p)", captured=floats("heads", "queries")),
    CASE.but(id="dropout", dropout_p=0.3, queries=40, weight="p*c0[h]", captured=floats("heads")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, "c")


def test_it_is_what_auto_runs_on_a_cpu() -> None:
    q, k, v, _ = CASE.tensors()
    assert lowerings.choose("auto", KernelSpec.of(q, k, v), "cpu").name == "c"


def test_what_it_does_not_generate_goes_to_aten() -> None:
    case = CASE.but(value_dtype=torch.float64)
    q, k, v, _ = case.tensors()
    assert lowerings.choose("auto", KernelSpec.of(q, k, v), "cpu").name == "aten"
    with pytest.raises(lowerings.LoweringError, match="float64 values"):
        call(case, "c")


@pytest.mark.parametrize("score", ["0.35*s + c0[h, i, j]", "where(le(j, i), c0[h, i, j], 0.0) + s"])
def test_a_captured_tensor_too_small_is_refused_or_clamped(score: str) -> None:
    case = CASE.but(score=score, captured=lambda case: [torch.randn(case.heads, case.queries, 5)])
    if "where" in score:  # may leave the tensor inside a branch, as every lowering clamps there
        torch.testing.assert_close(call(case, "c")[0], call(case, "aten")[0], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"captured tensor 0 has size 5 in dimension 2.*at least 17"):
            call(case, "c")


# --- ties and special values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(1, 2), (0, 2), (-3, 4)], ids=["constant", "two values", "-3..3"])
def test_ties_are_all_kept(dtype: torch.dtype, low: int, high: int) -> None:
    for topk in (1, 4, 9, 16, 17):
        case = CASE.but(dtype=dtype, topk=topk, score="s")
        torch.manual_seed(topk)
        q, k = (torch.randint(low, high, (2, 2, n, 8)).to(dtype) for n in (13, 17))
        tensors = [q, k, torch.randn(2, 2, 17, 17).to(dtype)]
        assert torch.equal(kept_by(case, "c", tensors), reference(case, tensors).kept)


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("x", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("topk", "weight"), [(3, "p"), (17, "p"), (3, ZEROED), (17, ZEROED), (17, "where(gt(p, 0.1), p, 0.0)")]
)
def test_nan_and_inf_as_in_the_reference(place: str, x: float, topk: int, weight: str) -> None:
    case = CASE.but(topk=topk, weight=weight)
    tensors = [y.detach().clone() for y in case.tensors()[:3]]
    tensors["qkv".index(place)][0, 0, 1, 0] = x
    exact, plain = reference(case, tensors), reference(case, tensors, torch.float32)
    assert_close("out", call(case, "c", tensors)[0], exact.out, plain.out)


@pytest.mark.parametrize("weight", ["p", ZEROED, f"0.5*{ZEROED}"])
def test_zeroed_weights_of_a_row_of_nan_keep_the_values_gradients(weight: str) -> None:
    case = CASE.but(weight=weight)
    q, k, v = (x.detach() for x in case.tensors()[:3])
    q[0, 0, 1, 0] = NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(call(case, "c", leaves)[0].sum(), leaves)
    expected = torch.autograd.grad(call(case, "reference", leaves)[0].sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert found[0][0, 0, 1].isnan().all()
    assert found[2].isnan().any() == (weight == "p")


def test_denormals_and_the_last_bit_are_told_apart() -> None:
    case = CASE.but(score="s", topk=2, head_dim=1)
    for row in ([3e-40, 1e-40, 2e-40, -1e-40, 0.0], [1.0, 1 + 2**-22, 1 - 2**-24, 1 + 2**-23], [-0.0, 0.0, -1.0, -2.0]):
        keys = torch.tensor(row + [-5.0] * (17 - len(row))).view(1, 1, 17, 1)
        tensors = (torch.ones(1, 1, 1, 1), keys, torch.zeros(1, 1, 17, 17))
        assert torch.equal(kept_by(case, "c", tensors), reference(case, tensors).kept)


@pytest.mark.parametrize("size", ["batch", "queries", "keys"])
def test_empty(size: str) -> None:
    case = CASE.but(**{size: 0})
    q, k, v, _ = case.tensors()
    out, logsumexp, _ = call(case, "c", (q, k, v))
    assert out.shape == (case.batch, 2, case.queries, 17)
    assert (out == 0).all()
    assert (logsumexp == -INF).all()
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "interleaved": lambda x: torch.stack((x, torch.full_like(x, NAN)), -1)[..., 0],
    "feature first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.cat((torch.full_like(x[:, :, :1], NAN), x), 2)[:, :, 1:],
    "misaligned": lambda x: torch.cat((torch.zeros(1, dtype=x.dtype), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(layout: str, dtype: torch.dtype) -> None:
    # 16 values a head: rows of values that are read where they lie
    case = CASE.but(dtype=dtype, heads=4, kv_heads=2, value_dim=16)
    strided = [LAYOUTS[layout](x.detach()).requires_grad_() for x in case.tensors()[:3]]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided]
    out, expected = call(case, "c", strided)[0], call(case, "c", plain)[0]
    assert torch.equal(out, expected)
    grad = LAYOUTS[layout](torch.randn_like(expected))
    for mine, theirs in zip(
        torch.autograd.grad(out, strided, grad), torch.autograd.grad(expected, plain, grad.clone()), strict=True
    ):
        assert torch.equal(mine, theirs)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        CASE.but(id="plain", value_dim=2, head_dim=3, queries=4, keys=5, topk=3, dtype=torch.float64),
        CASE.but(
            id="everything", value_dim=2, head_dim=3, queries=4, keys=5, topk=3, dtype=torch.float64, dropout_p=0.3,
            heads=4, kv_heads=2,
            score="where(le(j, i + 2), c0[h]*tanh(s/c0[h]), s) + c1[b, j]", weight="p*c2[i]*(1.0 + p)",
            captured=lambda case: [torch.rand(n, dtype=torch.float64) + 1.0 for n in ((4,), (2, 5), (4,))],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_gradcheck(case: Case) -> None:
    q, k, v, captured = case.tensors()
    assert torch.autograd.gradcheck(lambda *x: call(case, "c", x)[0], (q, k, v, *captured))


def test_the_backward_keeps_the_forward_s_keys() -> None:
    """A key has a gradient exactly if the forward kept it: shown by dV of a sum, which is the column sum of weights."""
    case = CASE.but(batch=1, heads=1, queries=64, keys=64, topk=20, value_dim=64)
    for seed in range(20):
        q, k, v, _ = case.but(seed=seed).tensors()
        out = call(case, "c", (q, k, torch.eye(64).view(1, 1, 64, 64)))[0]
        leaf = v.detach().requires_grad_()
        (dv,) = torch.autograd.grad(call(case, "c", (q, k, leaf))[0], leaf, torch.eye(64).view(1, 1, 64, 64))
        assert torch.equal(dv[0, 0].T != 0, out[0, 0] != 0)


@pytest.mark.parametrize("queries", [5, 20])
def test_lanes_past_the_last_query_add_nothing(queries: int) -> None:
    """They would see keys that no query may, with scores that have no exponential beside the last query's sum."""
    case = CASE.but(batch=1, heads=1, queries=queries, keys=40, head_dim=4, score="where(le(j, i), s, -oo)")
    v = case.tensors()[2]
    q, k = (torch.zeros(1, 1, n, 4) for n in (queries, 40))
    q[..., 0] = 1
    for score in (88.5, 90.75, 91.0, 200.0):
        k[:, :, queries:, 0] = score
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        gradients = torch.autograd.grad(call(case, "c", leaves)[0].sum(), leaves)
        assert all(x.isfinite().all() for x in gradients), score
        assert not gradients[1][:, :, queries:].any()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(batch: int, threads: None) -> None:
    case = CASE.but(score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys"), batch=batch, queries=300)
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        q, k, v, captured = case.tensors()
        out = call(case, "c", (q, k, v, *captured))
        results.append((*out, *torch.autograd.grad(out[0], (q, k, v, *captured), case.grad_out(out[0]))))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_baseline_instructions_keep_the_same_keys() -> None:
    portable = CLowering(Settings(from_environment().cache, target="portable"))
    undo = lowerings.register("c portable", portable)
    try:
        assert_matches_reference(CASE, "c portable")
        integers = [torch.randint(-3, 4, (2, 2, n, 8)).float() for n in (13, 17)] + [torch.randn(2, 2, 17, 17)]
        assert torch.equal(kept_by(CASE, "c portable", integers), kept_by(CASE, "c", integers))
    finally:
        undo()
