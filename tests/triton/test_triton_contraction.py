"""No score depends on how a compiler contracts: with contraction allowed, as Inductor compiles, no product that a score
is made of becomes part of a multiply-add, and no sum part of a matrix product."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton_specs import training

from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec
from kvt_compile.kernels.triton.candidates import default
from kvt_compile.kernels.triton.compile import _cuobjdump, compile_kernel
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.module import load, module

HELPERS = ("score_tile", "exact_sum", "tanh_")


def spec(score: str, dtype: str = "bfloat16") -> KernelSpec:
    captured = (CapturedSpec("float32", 3),) if "c0" in score else ()
    return KernelSpec(dtype, dtype, 64, 64, score=score, captured=captured)


PLAIN = spec("0.125*s")
BIAS = spec("0.125*s + c0[h, i, j]")
SOFTCAP = spec("50.0*tanh(0.0025*s)")
MASKED = spec("where(le(j, i), 0.125*s, -oo) + 16.0*sigmoid(c0[h, i, j])")
SPECS = {"plain": PLAIN, "bias": BIAS, "soft-cap": SOFTCAP, "scale, mask, sigmoid": MASKED}


def build(spec: KernelSpec, part: str, keys: int = 1024, contracting: bool = True, fusion: bool = True) -> Any:
    blocks = default(spec, part, keys, keys, hip=False)
    return compile_kernel(spec, part, blocks, "sm_90", getattr(module(spec, contracting=contracting), part), fusion)


def fused_lines(compiled: Any) -> list[int]:
    """The line of the source that each multiply-add of the PTX is from; 0 where the compiler does not know."""
    found, line = [], 0
    for text in compiled.asm["ptx"].splitlines():
        if place := re.match(r"\s*\.loc\s+\d+ (\d+) ", text):
            line = int(place[1])
        elif re.match(r"\s*(@%p\d+ )?fma\.", text):
            found.append(line)
    return found


def of_scores(spec: KernelSpec, contracting: bool = True) -> set[int]:
    """Lines of the functions that make a score."""
    tree = ast.parse(module_source(spec, contracting))
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in HELPERS]
    return {line for x in functions for line in range(x.lineno, (x.end_lineno or 0) + 1)}


def machine_multiply_adds(compiled: Any, folder: Path) -> int:
    """How many the GPU runs: ptxas may contract what LLVM did not."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\bFFMA\b", text))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("bias", 1024), slow("bias", 197), slow("soft-cap", 1024), slow("soft-cap", 197),
     slow("scale, mask, sigmoid", 1024), slow("scale, mask, sigmoid", 197)],
)  # fmt: skip
def test_a_score_adds_no_multiply_add_to_the_forward(name: str, keys: int, tmp_path: Path) -> None:
    """As many as where a score has no sum at all, in the PTX and in what the GPU runs: the rest is the selection's."""
    found, plain = build(SPECS[name], "forward", keys), build(PLAIN, "forward", keys)
    assert not of_scores(SPECS[name]) & set(fused_lines(found))
    assert fused_lines(found).count(0) == fused_lines(plain).count(0)
    assert len(fused_lines(found)) == len(fused_lines(plain))
    assert machine_multiply_adds(found, tmp_path) == machine_multiply_adds(plain, tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [slow(name, part) for name in SPECS if name != "plain" for part in ("backward_rows", "backward_q", "backward_kv")],
)
def test_no_score_of_a_backward_is_contracted(name: str, part: str) -> None:
    backward = training(SPECS[name])
    found, unfused = build(backward, part), build(backward, part, fusion=False)
    assert not of_scores(backward) & set(fused_lines(found))
    assert fused_lines(found).count(0) == fused_lines(unfused).count(0)


def test_without_exact_sums_scores_would_be_contracted() -> None:
    assert of_scores(BIAS, contracting=False) & set(fused_lines(build(BIAS, "forward", contracting=False)))


def test_exact_sums_spill_nothing() -> None:
    assert "STACK:0 " in _cuobjdump(build(BIAS, "forward").asm["cubin"])


# --- sums and matrix products -----------------------------------------------------------------------------------------


def accumulators(compiled: Any) -> set[str]:
    """What the products start from, by the names Triton gives: `cst` a constant, `acc0` a sum over the keys, ..."""
    found = re.findall(r"tt\.dot %\w+, %\w+, %([a-z]+\d?)", compiled.asm["ttir"])
    return {x.rstrip("_") for x in found}


@pytest.mark.parametrize("contracting", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["forward", pytest.param("backward_kv", marks=pytest.mark.slow)])
def test_no_product_starts_from_a_bias(part: str, contracting: bool) -> None:
    """Triton folds s + c into the product wherever s has no other use: in a forward, say, and not in its backward."""
    capped = spec("10.0*tanh(s + c0[h, i, j])")
    capped = capped if part == "forward" else training(capped)
    found = accumulators(build(capped, part, contracting=contracting, fusion=contracting))
    assert "cst" in found
    assert not any(x.startswith("c0") for x in found)


def test_a_plain_sum_would_be_folded() -> None:
    folded = spec("s + c0[h, i, j]")
    text = module_source(folded).replace("tl.fma(x, 1.0, y)", "x + y")
    blocks = default(folded, "forward", 1024, 1024, hip=False)
    compiled = compile_kernel(folded, "forward", blocks, "sm_90", load(text).forward)
    assert any(x.startswith("c0") for x in accumulators(compiled))
