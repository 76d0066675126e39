"""Triton's launch path without a GPU: every kernel is bound, compiled, assembled, loaded and launched on a stub driver.

By default every kind of kernel once; with -m slow all default configurations on all NVIDIA targets, and all that the
GPU tests launch.  test_triton_launch_faults.py shows what this catches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gpu_cases
import triton_resources
from gpu_cases import IDENTITY, IDENTITY_ROWS, LARGE, MEMORY, ROWS, SELECTED, TIES, Site, attention
from launching import run, softmax
from oracles import Case, everything, kept_by
from spec_calls import call_of
from stub_gpu import Stub, stub
from test_triton_interpreted import RESIDENT, STREAMING
from test_triton_traced import CASES as PACKAGED
from traced import OnStub, trace
from triton_specs import GATED, SPECS, SWIN, VIT, VIT32, training

from kvt_compile.integrations.aot import kernels_inside
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec
from kvt_compile.kernels.tiles import with_tables
from kvt_compile.kernels.triton.launch import LARGEST, Launcher
from kvt_compile.kernels.triton.targets import TARGETS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launched for real by test_triton_gpu.py")
NVIDIA = [name for name, (backend, *_) in TARGETS.items() if backend == "cuda"]
DEFAULTS = Launcher(chooser=lambda launch: launch.first)


@pytest.fixture
def gpu() -> Iterator[Stub]:
    with stub("sm_90") as found, found.registered(DEFAULTS.chooser):
        yield found


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_every_part_of_the_templates(name: str, gpu: Stub) -> None:
    spec = SPECS[name]
    if isinstance(spec, SoftmaxSpec):
        softmax(gpu, spec, (3, 5, 7))
    else:
        run(gpu, call_of(spec, 70, 90), DEFAULTS)


def captured(*kinds: tuple[str, int]) -> tuple[CapturedSpec, ...]:
    return tuple(CapturedSpec(dtype, ndim) for dtype, ndim in kinds)


MIXED = KernelSpec("float16", "float32", 32, 80, score="s*c0", captured=captured(("float32", 0)))
MANY = KernelSpec(
    "bfloat16", "bfloat16", 64, 64, score="where(c3[i, j], s*c2[h, i, j], -oo) + c0[i, j] + c1[j]",
    captured=captured(("int16", 2), ("uint8", 1), ("float64", 3), ("bool", 2)),
)  # fmt: skip
TYPES = {
    "float16 scores, float32 values, a number": MIXED,
    "float64 scores, float32 values": KernelSpec("float64", "float32", 16, 16, score="0.25*s"),
    "integers, truth values, float64": MANY,
    "gradient of a bias alone": dataclasses.replace(SWIN, needs_grad=(False, False, False, True, False)),
    "gradient of v alone": dataclasses.replace(VIT, needs_grad=(False, False, True)),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_and_gradients(name: str, gpu: Stub) -> None:
    run(gpu, call_of(TYPES[name], 33, 50, heads=4, kv_heads=2), DEFAULTS)


LISTS = {
    "every allowed key": "window(13) | prefix",
    "no bits": "halo(16, 0) | prefix",
    "heads that differ": "shifted(3) | prefix",
    "blocks": "regions(2, 16) | prefix",
    "chosen by tensors": "heads(2) & keys(5) | window(3) | prefix",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_tiles(name: str, gpu: Stub) -> None:
    spec = KernelSpec("bfloat16", "bfloat16", 16, 16, score="0.25*s", select=LISTS[name])
    for version in (spec, training(spec)):
        run(gpu, with_tables(call_of(version, 70, 70, heads=4, kv_heads=2, topk=70)), DEFAULTS)


@pytest.mark.parametrize("spec", [VIT, training(GATED)], ids=["forward", "backward"])
def test_every_number_is_one(spec: KernelSpec, gpu: Stub) -> None:
    """Triton makes a 1 part of the kernel: the name stands for a Python number there."""
    run(gpu, call_of(spec, 1, 1, batch=1, heads=1), DEFAULTS)


@pytest.mark.parametrize("spec", [VIT32, training(VIT)], ids=["forward", "backward"])
def test_offsets_of_64_bits(spec: KernelSpec, gpu: Stub) -> None:
    call = call_of(dataclasses.replace(spec, score="s + n0", sizes=1), 20, 30)
    run(gpu, dataclasses.replace(call, sizes=(LARGEST,)), DEFAULTS)


@pytest.mark.parametrize("change", [{"topk": 3}, {"dropout_p": 0.3}, {"sizes": (3,)}], ids=str)
def test_numbers_that_change_from_call_to_call_compile_nothing_anew(change: dict[str, Any], gpu: Stub) -> None:
    spec = KernelSpec("bfloat16", "bfloat16", 16, 16, score="s + n0", sizes=1, dropout=True)
    call = dataclasses.replace(call_of(spec, 20, 30), topk=1, sizes=(16,))
    run(gpu, call, DEFAULTS)
    gpu.specialised.clear()
    run(gpu, dataclasses.replace(call, **change), DEFAULTS)
    assert gpu.specialised == []


QUICK_PACKAGES = ("bias, whole rows", "plain, tiles", "scores kept")


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK_PACKAGES)) for x in PACKAGED]
)
def test_kernels_of_packages(case: str) -> None:
    module, inputs, dynamic, *_ = PACKAGED[case]
    with kernels_inside():
        graph = trace(module, inputs, dynamic)
    with stub("sm_90") as gpu:
        before = gpu.launches
        OnStub(graph).run(*inputs)
        assert gpu.launches == before + 1


# --- everything -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", triton_resources.SIZES, ids=str)
@pytest.mark.parametrize("name", triton_resources.SPECS)
@pytest.mark.parametrize("target", NVIDIA)
def test_every_default_configuration(target: str, name: str, size: tuple[int, int]) -> None:
    spec = triton_resources.SPECS[name]
    with stub(target) as gpu:
        if isinstance(spec, SoftmaxSpec):
            softmax(gpu, spec, (1, *size))
        else:
            for version in (spec, training(spec)):
                run(gpu, call_of(version, *size, batch=1), DEFAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*RESIDENT, *STREAMING, *LARGE, *SELECTED], ids=str)
def test_what_the_gpu_tests_compare(case: Case, gpu: Stub) -> None:
    everything(case, "triton")
    kept_by(case, "triton")
    assert gpu.launches


@pytest.mark.slow
@pytest.mark.parametrize("tie", TIES, ids=str)
def test_ties(tie: tuple[torch.dtype, int, int, int], gpu: Stub) -> None:
    for case, tensors in gpu_cases.ties(*tie):
        kept_by(case, "triton", tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "keys"), IDENTITY, ids=str)
def test_identities(dtype: torch.dtype, keys: int, gpu: Stub) -> None:
    q, k = (torch.zeros(2, 3, n, 64, dtype=dtype) for n in (min(keys, IDENTITY_ROWS), keys))
    values = torch.zeros(2, 3, keys, 256, requires_grad=True)
    out = attention(q, k, values, keys // 2)
    torch.autograd.grad(out, values, torch.ones(256).expand_as(out))


@pytest.mark.slow
def test_sites_and_long_rows(gpu: Stub) -> None:
    site = Site()
    torch.autograd.grad(site(*(leaves := gpu_cases.inputs())).sum(), [*leaves, site.bias])
    attention(*(x.detach() for x in leaves), 100, "s*c0", [torch.tensor(0.2)])
    for n in MEMORY:
        leaves = [torch.zeros(1, 4, n, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        torch.autograd.grad(attention(*leaves, n // 8).sum(), leaves)
    for shape in ROWS:
        softmax(gpu, SoftmaxSpec("float32", "float32"), shape)
