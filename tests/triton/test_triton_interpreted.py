"""The generated Triton kernels, in Triton's interpreter, against the float64 reference: outputs, kept keys, gradients,
special values, layouts.  Shapes are small; those of a real GPU are in test_triton_gpu.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from gpu_cases import PLAIN as CASE
from interpreted import NAME, Recorder, triton_on_cpu
from oracles import Case, assert_close, assert_matches_reference, call, floats, kept_by, reference
from torch import Tensor

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton.lowering import LOWERING

pytest.importorskip("triton")
INF, NAN = math.inf, math.nan


@pytest.fixture
def resident() -> Iterator[Recorder]:
    yield from _lowering("resident")


@pytest.fixture
def streaming() -> Iterator[Recorder]:
    yield from _lowering("streaming")


def _lowering(kind: str) -> Iterator[Recorder]:
    with warnings.catch_warnings(), triton_on_cpu(kind) as recorder:
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of the infinities that a GPU computes without a word
        yield recorder


# CASE is small, and 2 rows of tiles are only in the cases that need them: an interpreted tile takes 50 ms


def table(case: Case) -> list[Tensor]:
    index = torch.arange(case.queries)[:, None] - torch.arange(case.keys) + case.keys - 1
    return [torch.randn(case.queries + case.keys, case.heads), index]


def masks(case: Case) -> list[Tensor]:
    """Row 3 may attend to nothing, row 4 to key 2 only."""
    keep = torch.rand(2, case.queries, case.keys) > 0.4
    keep[:, 3] = False
    keep[:, 4] = torch.arange(case.keys) == 2
    return [keep, torch.randn(case.heads, case.queries, case.keys, dtype=torch.bfloat16)]


SEVERAL = CASE.but(id="several heads and tiles", heads=2, queries=17, keys=35, topk=9)
RESIDENT = [
    CASE,
    CASE.but(id="one query", queries=1),
    CASE.but(id="k = 2", topk=2),
    CASE.but(id="k = N", topk=19),
    CASE.but(id="bfloat16", dtype=torch.bfloat16),
    CASE.but(id="float16", dtype=torch.float16),
    CASE.but(id="float64", dtype=torch.float64),
    CASE.but(id="bfloat16 scores, float32 values", dtype=torch.bfloat16, value_dtype=torch.float32),
    CASE.but(id="float64 scores, float32 values", dtype=torch.float64, value_dtype=torch.float32),
    CASE.but(id="heads of three parts", head_dim=200, value_dim=80),
    CASE.but(id="key bias", score="s*c0[j] + 1.0", captured=floats("keys")),
    CASE.but(id="row bias", score="s*c0[i] + 1.0", captured=floats("queries")),
    CASE.but(id="table through an index tensor", score="0.35*s + c0[c1[i, j], h]", captured=table),
    CASE.but(id="window mask and bias", batch=3, score="where(c0[b % 2, i, j], 0.35*s, -oo) + c1[h, i, j]",
             captured=masks),
    CASE.but(id="division", score="0.35*s + c0[(i - j) // n0 + 10, (j - i) % n0]", sizes=(3,), captured=floats(20, 3)),
    CASE.but(id="every function", score="where(lt(s, 0.3), maximum(s, -1.0)*sigmoid(s), exp(minimum(0.1*s, 2.0)))"
             " + 0.1*log(sqrt(s**2 + 1.0)) + sin(0.1*s)*cos(s) + erf(clamp(s, -2.0, 2.0)) + abs(0.1*s) + relu(s)"
             " + 0.5*tanh(s)"),
    CASE.but(id="tanh in float64", score="2.0*tanh(0.2*s)", dtype=torch.float64),
    CASE.but(id="gate", weight="p*c0[h, i]*(1.0 + p)", captured=floats("heads", "queries")),
    CASE.but(id="score and weight", score="s*c0[h]", weight="p*c0[h]",
             captured=floats("heads")),
]  # fmt: skip
STREAMING = [
    SEVERAL,
    CASE.but(id="gqa", heads=4, kv_heads=2, keys=17, score="0.35*s + 0.1*c0[h, j]",
             captured=floats("heads", "keys")),
    CASE.but(id="bfloat16", dtype=torch.bfloat16, keys=35),
    CASE.but(id="bias", score="0.35*s + c0[h, i, j]", keys=35, captured=floats("heads", "queries", "keys")),
    CASE.but(id="causal", queries=35, keys=35, score="where(le(j, i), 0.35*s, -oo)"),
    CASE.but(id="a window of keys", queries=35, keys=35,
             score="where(logical_and(le(j, i + 3), gt(j, i - 9)), s, -oo)"),
    CASE.but(id="gate", weight="p*c0[h, i]*(1.0 + p)", keys=35, captured=floats("heads", "queries")),
    CASE.but(id="dropout", batch=2, heads=2, dropout_p=0.3, queries=3, keys=9, weight="p*c0[h]",
             captured=floats("heads")),
]  # fmt: skip


@pytest.mark.parametrize("case", RESIDENT, ids=str)
def test_whole_rows_match_the_reference(case: Case, resident: Recorder) -> None:
    assert_matches_reference(case, NAME)
    assert {"forward", "backward_rows", "backward_q", "backward_kv"} <= set(resident.asked)


@pytest.mark.parametrize("case", STREAMING, ids=str)
def test_tiles_of_rows_match_the_reference(case: Case, streaming: Recorder) -> None:
    assert_matches_reference(case, NAME)
    assert {"forward", "backward_rows", "backward_q", "backward_kv"} <= set(streaming.asked)


# --- ties and special values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize(("low", "high"), [(1, 2), (0, 2), (-3, 4)], ids=["constant", "two values", "-3..3"])
def test_ties_are_all_kept(kind: str, low: int, high: int) -> None:
    with warnings.catch_warnings(), triton_on_cpu(kind):
        warnings.simplefilter("ignore", RuntimeWarning)
        for topk in (1, 9, 16) if kind == "resident" else (9,):
            case = CASE.but(topk=topk, score="s", batch=1)
            torch.manual_seed(topk)
            q, k = (torch.randint(low, high, (1, 1, n, 4)).float() for n in (16, 19))
            tensors = [q, k, torch.randn(1, 1, 19, 4)]
            assert torch.equal(kept_by(case, NAME, tensors), reference(case, tensors).kept)


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize(("topk", "weight"), [(3, "p"), (19, "p"), (19, "where(ne(p, p), 0.0, p)")])
def test_nan_and_inf_as_in_the_reference(place: str, topk: int, weight: str, resident: Recorder) -> None:
    for x in (NAN, INF, -INF):
        case = CASE.but(topk=topk, weight=weight)
        tensors = [y.detach().clone() for y in case.tensors()[:3]]
        tensors["qkv".index(place)][0, 0, 1, 0] = x
        exact, plain = reference(case, tensors), reference(case, tensors, torch.float32)
        assert_close("out", call(case, NAME, tensors)[0], exact.out, plain.out)


@pytest.mark.parametrize("weight", ["p", "where(ne(p, p), 0.0, p)", "where(gt(p, 0.1), p, 0.0)"])
def test_a_row_of_nan_has_gradients_of_nan_and_others_have_not(weight: str, streaming: Recorder) -> None:
    case = CASE.but(weight=weight)
    q, k, v = (x.detach() for x in CASE.tensors()[:3])
    q[0, 0, 1, 0] = NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, _, dv = torch.autograd.grad(call(case, NAME, leaves)[0].sum(), leaves)
    assert dq[0, 0, 1].isnan().all()
    assert dq[0, 0, [0, 2, 3, 4, 5, 6]].isfinite().all()
    assert dv[0, 0].isnan().all() if weight == "p" else dv.isfinite().all()


def test_masked_keys_of_a_row_of_nan_have_no_gradient_of_nan(streaming: Recorder) -> None:
    def mask(case: Case) -> list[Tensor]:
        allowed = torch.ones(case.queries, case.keys, dtype=torch.bool)
        allowed[1, 4:] = False
        return [allowed, torch.zeros(case.queries)]

    case = CASE.but(score="0.5*where(c0[i, j], s + c1[i], -1e9)", captured=mask, topk=CASE.keys)
    q, k, v, (allowed, bias) = case.tensors()
    bias = bias.detach().clone()
    bias[1] = NAN
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    (dk,) = torch.autograd.grad(call(case, NAME, (*leaves, allowed, bias))[0].sum(), leaves[1])
    assert dk[..., :4, :].isnan().all()
    assert dk[..., 4:, :].isfinite().all()


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_fully_masked_rows_are_zero_in_both_directions(kind: str) -> None:
    def mask(case: Case) -> list[Tensor]:
        return [masks(case)[0][0]]

    for score in ("where(c0[i, j], s, -oo)", "s + log(where(c0[i, j], 1.0, 0.0))"):
        case = CASE.but(score=score, captured=mask)
        with warnings.catch_warnings(), triton_on_cpu(kind):
            warnings.simplefilter("ignore", RuntimeWarning)
            q, k, v, captured = case.tensors()
            out, logsumexp, threshold = call(case, NAME, (q, k, v, *captured))
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out[:, :, 3] == 0).all()
        assert (logsumexp[:, :, 3] == -INF).all()
        assert (threshold[:, :, 3:5] == -INF).all()
        torch.testing.assert_close(out[:, :, 4], v[:, :, 2])
        assert all(g.isfinite().all() for g in gradients)
        assert (gradients[0][:, :, 3] == 0).all()


def test_denormals_and_the_last_bit_are_told_apart(resident: Recorder) -> None:
    case = CASE.but(score="s", topk=2, head_dim=1)
    for row in ([3e-40, 1e-40, 2e-40, -1e-40, 0.0], [1.0, 1 + 2**-22, 1 - 2**-24, 1 + 2**-23], [-0.0, 0.0, -1.0, -2.0]):
        keys = torch.tensor(row + [-5.0] * (17 - len(row))).view(1, 1, 17, 1)
        tensors = (torch.ones(1, 1, 1, 1), keys, torch.zeros(1, 1, 17, 17))
        assert torch.equal(kept_by(case, NAME, tensors), reference(case, tensors).kept)


def test_a_row_masked_by_a_large_finite_number_has_the_gradient_of_a_mean(streaming: Recorder) -> None:
    """logsumexp = -1e9 + log(n) rounds to -1e9 in float32; the backward must not lose the log(n)."""
    q, k, v = (torch.randn(1, 1, n, 8).requires_grad_() for n in (3, 5, 5))
    mask = torch.zeros(1, 1, 3, 1, dtype=torch.bool)
    mask[0, 0, 1] = True
    out = torch.ops.kvt.attention(q, k, v, [mask], "where(c0[0, 0, i, 0], -1e9, s)", "p", 5, [], 0.0, None, NAME)[0]
    out[0, 0, 1].sum().backward()
    torch.testing.assert_close(v.grad, torch.full_like(v, 0.2))


@pytest.mark.parametrize("size", ["batch", "queries", "keys"])
def test_empty(size: str, resident: Recorder) -> None:
    case = CASE.but(**{size: 0})
    q, k, v, _ = case.tensors()
    out, logsumexp, _ = call(case, NAME, (q, k, v))
    assert out.shape == (case.batch, 1, case.queries, 4)
    assert (out == 0).all()
    assert (logsumexp == -INF).all()
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    assert resident.asked == []


@pytest.mark.parametrize("score", ["0.35*s + c0[h, i, j]", "where(le(j, i), c0[h, i, j], 0.0) + s"])
def test_a_captured_tensor_too_small_is_refused_or_clamped(score: str, resident: Recorder) -> None:
    case = CASE.but(score=score, captured=lambda case: [torch.randn(case.heads, case.queries, 5)])
    if "where" in score:  # may leave the tensor inside a branch, as every lowering clamps there
        torch.testing.assert_close(call(case, NAME)[0], call(case, "aten")[0], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"captured tensor 0 has size 5 in dimension 2.*at least 19"):
            call(case, NAME)


def test_coordinates_beyond_32_bits_are_computed_in_64(resident: Recorder) -> None:
    """i * 2**30 leaves 32 bits at i = 2; the index that comes of it does not leave the tensor."""
    case = CASE.but(score="0.35*s + c0[i*1073741824 // 1073741824]", captured=floats("queries"))
    torch.testing.assert_close(call(case, NAME)[0], call(case, "aten")[0], rtol=1e-4, atol=1e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "interleaved": lambda x: torch.stack((x, torch.full_like(x, NAN)), -1)[..., 0],
    "feature first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.cat((torch.full_like(x[:, :, :1], NAN), x), 2)[:, :, 1:],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, resident: Recorder) -> None:
    case = CASE.but(batch=2)
    strided = [LAYOUTS[layout](x.detach()).requires_grad_() for x in case.tensors()[:3]]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided]
    out, expected = call(case, NAME, strided)[0], call(case, NAME, plain)[0]
    assert torch.equal(out, expected)
    grad = LAYOUTS[layout](torch.randn_like(expected))
    for mine, theirs in zip(
        torch.autograd.grad(out, strided, grad), torch.autograd.grad(expected, plain, grad.clone()), strict=True
    ):
        assert torch.equal(mine, theirs)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_the_backward_keeps_the_forward_s_keys(streaming: Recorder) -> None:
    """A key has a gradient exactly if the forward kept it: dV of the identity is the matrix of weights, transposed."""
    case = CASE.but(queries=16, keys=32, topk=10, value_dim=32)
    for seed in range(3):
        q, k, _, _ = case.but(seed=seed).tensors()
        leaf = torch.eye(32).view(1, 1, 32, 32).requires_grad_()
        out = call(case, NAME, (q.detach(), k.detach(), leaf))[0]
        (dv,) = torch.autograd.grad(out, leaf, torch.eye(16, 32).view(1, 1, 16, 32))
        assert torch.equal(dv[0, 0].T[:16] != 0, out[0, 0] != 0)


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [("q", {"backward_q"}), ("k", {"backward_kv"}), ("v", {"backward_kv"}), ("c", {"backward_q"})],
)
def test_only_the_needed_gradients(wanted: str, kernels: set[str], resident: Recorder) -> None:
    case = CASE.but(score="s*c0[h]", captured=floats("heads"))
    q, k, v, (c,) = (x if isinstance(x, list) else x.detach() for x in case.tensors())
    named = {"q": q, "k": k, "v": v, "c": c.detach()}
    leaf = named[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(call(case, NAME, tuple(named.values()))[0].sum(), leaf)
    (theirs,) = torch.autograd.grad(call(case, "aten", tuple(named.values()))[0].sum(), leaf)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert set(resident.asked) == {"forward", "backward_rows"} | kernels


def test_deterministic_mode_sums_captured_gradients_in_order(resident: Recorder) -> None:
    case = CASE.but(score="0.35*s + c0[h, i, j]", captured=floats("heads", "queries", "keys"))
    q, k, v, (c,) = case.tensors()
    out = call(case, NAME, (q, k, v, c))[0]
    expected = torch.autograd.grad(out, (q, k, v, c), torch.ones_like(out), retain_graph=True)
    resident.asked.clear()
    torch.use_deterministic_algorithms(True)
    try:
        found = torch.autograd.grad(out, (q, k, v, c), torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3], strict=True))
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-5)
    assert "backward_q" in resident.asked


# --- the lowering -----------------------------------------------------------------------------------------------------


def test_auto_prefers_it_on_a_gpu_and_not_on_a_cpu() -> None:
    spec = KernelSpec("float32", "float32", 8, 8)
    assert lowerings.choose("auto", spec, "cuda").name == "triton"
    assert lowerings.choose("auto", spec, "cpu").name != "triton"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (KernelSpec("float32", "float64", 8, 8), "float64 values"),
        (KernelSpec("float32", "float32", 257, 8), "heads of 257 and 8 features"),
        (KernelSpec("float32", "float32", 8, 8, score="s**2.5"), "power"),
    ],
    ids=["mixed", "wide", "power"],
)
def test_what_it_does_not_generate_goes_to_aten(spec: KernelSpec, reason: str) -> None:
    assert reason in (LOWERING.supports(spec) or "")
    assert lowerings.choose("auto", spec, "cuda").name == "aten"
    with pytest.raises(lowerings.LoweringError, match=reason):
        lowerings.choose("triton", spec, "cuda")


def test_without_triton_a_gpu_runs_aten_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvt_compile.kernels.triton.lowering as module

    module.warn_once.cache_clear()
    lowerings.choose.cache_clear()
    monkeypatch.setattr(module, "has_triton", lambda: False)
    spec = KernelSpec("float32", "float32", 8, 8)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert lowerings.choose("auto", spec, "cuda").name == "aten"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LOWERING.supports(spec) == "Triton is not installed"
    monkeypatch.undo()
    lowerings.choose.cache_clear()
