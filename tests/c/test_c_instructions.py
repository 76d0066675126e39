"""One text for every instruction set: those this CPU has agree on kept keys and values, the others compile to what they
are named for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from oracles import Case, assert_close, assert_matches_reference, call, everything, floats, kept_by, reference
from torch import Tensor

from kvt_compile.kernels.c import CLowering, source, toolchain
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.spec import KernelSpec

NAN, INF = float("nan"), float("inf")
BF16 = torch.bfloat16
CASE = Case("ragged", dtype=BF16, queries=77, keys=233, topk=90, head_dim=40, value_dim=24, score="0.05*s")
SPEC = KernelSpec("bfloat16", "bfloat16", 40, 24, score=CASE.score)


@lru_cache(maxsize=1)
def there() -> list[str]:
    """Instruction sets of this CPU, the widest first."""
    found = []
    for target in ("amx", "avx512bf16", "avx512", "avx2", "portable"):
        try:
            toolchain.find_compiler(None, target)
        except toolchain.BuildError:
            continue
        found.append(target)
    return found


@pytest.fixture(autouse=True)
def named() -> Iterator[None]:
    """Every set as a lowering of its own: "c amx" and so on."""
    undo = [lowerings.register(f"c {x}", CLowering(replace(from_environment(), target=x))) for x in there()]
    yield
    for back in reversed(undo):
        back()


def same_keys(case: Case, tensors: list[Tensor]) -> None:
    """Every set keeps the reference's keys."""
    expected = reference(case, tensors).kept
    for target in there():
        assert torch.equal(kept_by(case, f"c {target}", tensors), expected), target


@pytest.mark.parametrize("target", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
def test_matches_the_reference(target: str) -> None:
    if target not in there():
        pytest.skip(f"this CPU has no {target}")
    assert_matches_reference(CASE, f"c {target}")


def test_the_natives_road_is_the_best_of_them() -> None:
    if there() == ["portable"]:
        pytest.skip("nothing to choose from")
    ours, best = (everything(CASE, x) for x in ("c", f"c {there()[0]}"))
    assert all(torch.equal(ours[name], best[name]) for name in ours)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (0, 2), (-3, 4)], ids=["constant", "two values", "-3..3"])
def test_ties(low: int, high: int) -> None:
    torch.manual_seed(low + 10)
    q, k = (torch.randint(low, high, (1, 2, n, 40)).to(BF16) for n in (77, 233))
    for topk in (1, 90, 232, 233):
        same_keys(CASE.but(topk=topk), [q, k, torch.randn(1, 2, 233, 24).to(BF16)])


@pytest.mark.parametrize("place", ["q", "k", "one of q", "one of k", "both"])
def test_products_that_a_bfloat16_unit_would_flush_are_told_apart(place: str) -> None:
    """Scores that are denormal, or sums that cancel to one: a unit that takes them for zero ties them all."""
    torch.manual_seed(0)
    q, k = (torch.randint(1, 100, (1, 2, n, 40)).to(BF16) for n in (77, 233))
    if place.startswith("one of"):
        x = q if place[-1] == "q" else k
        x[..., 0], x[..., 1:] = x[..., 0] * 2.0**-130, 0.0
    elif place == "both":
        q, k = (q - 50) * 2.0**-70, (k - 50) * 2.0**-68
    elif place == "q":
        q = q * 2.0**-132
    else:
        k = k * 2.0**-132
    same_keys(CASE, [q, k, torch.randn(1, 2, 233, 24).to(BF16)])


def test_numbers_just_large_enough_stay_on_the_fast_road_and_are_exact() -> None:
    """2^-56 and above: every sum of products is a multiple of the smallest normal number."""
    torch.manual_seed(0)
    q, k = (torch.randint(-1, 2, (1, 2, n, 40)) * (1 + torch.randint(0, 128, (1, 2, n, 40)) / 128) for n in (77, 233))
    q, k = (q * 2.0**-56).to(BF16), (k * 2.0**-56).to(BF16)
    same_keys(CASE, [q, k, torch.randn(1, 2, 233, 24).to(BF16)])


def test_denormal_values_are_not_lost() -> None:
    tensors = [x.detach() for x in CASE.tensors()[:3]]
    tensors[2] = (tensors[2].float() * 2.0**-130).to(BF16)
    exact, plain = reference(CASE, tensors), reference(CASE, tensors, torch.float32)
    for target in there():
        out = call(CASE, f"c {target}", tensors)[0]
        assert out.count_nonzero() > out.numel() / 2
        assert_close(target, out, exact.out, plain.out.to(BF16))


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("x", [NAN, INF, -INF], ids=str)
def test_nan_and_infinities(place: str, x: float) -> None:
    tensors = [y.detach().clone() for y in CASE.tensors()[:3]]
    tensors["qkv".index(place)][0, 0, 1, 0] = x
    exact, plain = reference(CASE, tensors), reference(CASE, tensors, torch.float32)
    for target in there():
        assert_close(target, call(CASE, f"c {target}", tensors)[0], exact.out, plain.out.to(BF16))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (31, 33), (32, 32), (33, 31), (5, 97), (64, 193)])
def test_ragged_sizes(queries: int, keys: int) -> None:
    for target in there()[:2]:
        case = CASE.but(queries=queries, keys=keys, topk=(keys + 1) // 2, heads=4, kv_heads=2)
        exact, plain, actual = (everything(case, source) for source in ("exact", "plain", f"c {target}"))
        for name in ("out", "logsumexp", "dq", "dk", "dv"):
            assert_close(name, actual[name], exact[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        CASE.but(id="bias, dropout, gate", score="0.2*s + c0[h, i, j]", weight="p*c1[h]", dropout_p=0.2,
                 captured=lambda case: [torch.randn(2, 77, 233), torch.rand(2) + 0.5]),
        CASE.but(id="float values", value_dtype=torch.float32),
        CASE.but(id="float queries", dtype=torch.float32, value_dtype=BF16),
        CASE.but(id="half values", value_dtype=torch.float16),
        CASE.but(id="wide heads", head_dim=96, value_dim=130, score="0.1*s"),
        CASE.but(id="one feature", head_dim=1, value_dim=1, score="s + c0[h, i, j]",
                 captured=floats("heads", "queries", "keys")),
    ],
    ids=str,
)  # fmt: skip
def test_every_road_of_every_set(case: Case) -> None:
    for target in there():
        assert_matches_reference(case, f"c {target}")


def test_the_backward_keeps_the_forward_s_keys() -> None:
    case = CASE.but(batch=1, heads=1, queries=24, keys=24, topk=9)
    identity = torch.eye(24, dtype=BF16).view(1, 1, 24, 24)
    for target in there():
        for seed in range(5):
            q, k, v, _ = case.but(seed=seed).tensors()
            out = call(case, f"c {target}", (q, k, identity))[0]
            leaf = v.detach().requires_grad_()
            (dv,) = torch.autograd.grad(call(case, f"c {target}", (q, k, leaf))[0], leaf, identity)
            assert torch.equal(dv[0, 0].T != 0, out[0, 0] != 0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=["usual", "all ones", "all ones, negative"])
def test_a_gradient_that_is_not_a_number_stays_one(bits: int) -> None:
    """Rounding to bfloat16 adds half of its last bit, which would carry out of a NaN that is all ones."""
    nan = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    case = CASE.but(weight="p*c0[i, j]", captured=lambda case: [torch.ones(77, 233)])
    q, k, v, (gate,) = case.tensors()
    with torch.no_grad():
        gate[3, 5] = nan
    kept = kept_by(case, "c", [q, k, v, gate])[:, :, 3, 5].nonzero().tolist()
    assert kept, "no head keeps that key: choose another"
    for target in there():
        out = call(case, f"c {target}", [q, k, v, gate])[0]
        dq, dk, dv = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
        for b, h in kept:
            assert out[b, h, 3].isnan().all(), target
            assert dq[b, h, 3].isnan().all(), target
            assert dv[b, h, 5].isnan().all(), target
            assert dk[b, h].isnan().any(), target


WANTED = {
    "amx": r"tdpbf16ps.*|ldtilecfg.*",
    "avx512bf16": r"vdpbf16ps.*zmm",
    "avx512": r"vfmadd\w+ps.*zmm",
    "avx2": r"vfmadd\w+ps.*ymm",
    "portable": r"mulps.*xmm",
}


@pytest.mark.parametrize("target", WANTED)
def test_it_compiles_to_the_instructions_it_is_named_for(target: str, tmp_path: Path) -> None:
    compiler = toolchain.find_compiler(None, "native")
    flags = toolchain.TARGETS["x86_64"].get(target)
    if flags is None or compiler.flags != ("-march=native",) or shutil.which("objdump") is None:
        pytest.skip("no objdump, or another kind of CPU")
    (tmp_path / "kernel.c").write_text(source(SPEC))
    try:
        replace(compiler, target=target, flags=flags).build(tmp_path / "kernel.c", tmp_path / "kernel.so")
    except toolchain.BuildError as error:
        pytest.skip(f"this compiler does not know {target}: {error}")
    command = ["objdump", "-d", "--no-show-raw-insn", str(tmp_path / "kernel.so")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(WANTED[target], text)
    if target != "amx":
        assert "tdpbf16ps" not in text


def test_a_set_that_the_cpu_has_not_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    if "x86_64" not in toolchain.platform.machine():
        pytest.skip("another kind of CPU")
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: frozenset({"avx2", "fma", "bmi2"}))
    with pytest.raises(
        toolchain.BuildError, match=r"'amx' needs amx_tile, .*which this CPU has not; it has native, avx2"
    ):
        toolchain.find_compiler(None, "amx")
    toolchain.find_compiler(None, "avx2")
