"""The Triton lowering on a GPU: against the float64 reference, at sizes the interpreter cannot reach, and in compiled,
captured and exported use.  `make test-gpu`; nothing here runs without a GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu_cases
import pytest
import torch
from gpu_cases import IDENTITY, IDENTITY_ROWS, LARGE, MEMORY, ROWS, SELECTED, TIES, Site, attention, ties
from oracles import Case, assert_matches_reference, kept_by, reference
from test_triton_interpreted import RESIDENT, STREAMING
from torch import Tensor

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.op.lowerings import Gradients
from kvt_compile.kernels.triton.lowering import LOWERING, TritonLowering

pytestmark = pytest.mark.gpu
NAME = "triton by way of a gpu"


class ByWayOfGpu(TritonLowering):
    """Takes CPU tensors, so that everything the CPU lowerings are tested with tests this one."""

    def __init__(self) -> None:
        super().__init__(devices=("cpu",))

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        out, logsumexp, threshold = LOWERING.forward(on_gpu(call))
        return out.cpu(), logsumexp.cpu(), threshold.cpu()

    def backward(self, call: AttentionCall, *saved: Tensor) -> Gradients:
        dq, dk, dv, rest = LOWERING.backward(on_gpu(call), *(x.cuda() for x in saved))
        first, second, third, *others = (None if x is None else x.cpu() for x in (dq, dk, dv, *rest))
        return first, second, third, others


def on_gpu(call: AttentionCall) -> AttentionCall:
    return dataclasses.replace(
        call,
        q=call.q.cuda(),
        k=call.k.cuda(),
        v=call.v.cuda(),
        captured=[c.cuda() for c in call.captured],
        seed=None if call.seed is None else call.seed.cuda(),
    )


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    undo = lowerings.register(NAME, ByWayOfGpu())
    yield
    undo()


@pytest.mark.parametrize("case", [*RESIDENT, *STREAMING, *LARGE, *SELECTED], ids=str)
def test_matches_the_reference(case: Case) -> None:
    assert_matches_reference(case, NAME, rounding=True)


@pytest.mark.parametrize(("dtype", "low", "high", "keys"), TIES, ids=str)
def test_ties_are_all_kept(dtype: torch.dtype, low: int, high: int, keys: int) -> None:
    for case, tensors in ties(dtype, low, high, keys):
        assert torch.equal(kept_by(case, NAME, tensors), reference(case, tensors).kept)


@pytest.mark.parametrize(("dtype", "keys"), IDENTITY, ids=str)
def test_the_backward_keeps_the_forward_s_keys(dtype: torch.dtype, keys: int) -> None:
    """dV of the identity is the matrix of weights: its kept set is that of the backward, the output's the forward's."""
    rows = min(keys, IDENTITY_ROWS)
    q, k = (torch.randn(2, 3, n, 64, device="cuda", dtype=dtype) for n in (rows, keys))
    for start in range(0, keys, 256):
        values = torch.zeros(2, 3, keys, 256, device="cuda")
        width = min(256, keys - start)
        values[:, :, start : start + width, :width] = torch.eye(width, device="cuda")
        values.requires_grad_()
        out = attention(q, k, values, keys // 2)
        grad = torch.eye(rows, 256, device="cuda").expand_as(out)
        (dv,) = torch.autograd.grad(out, values, grad)
        weights = dv[:, :, start : start + width, :rows].transpose(-1, -2)
        assert torch.equal(weights != 0, out[..., :width] != 0)


def inputs(seed: int = 0) -> list[Tensor]:
    return gpu_cases.inputs(seed, "cuda")


def test_torch_compile() -> None:
    site = Site().cuda()
    expected, found = (function(*inputs()) for function in (site, torch.compile(site, fullgraph=True)))
    assert torch.equal(expected, found)
    (ours,) = torch.autograd.grad(found.float().square().sum(), site.bias)
    (theirs,) = torch.autograd.grad(expected.float().square().sum(), site.bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # atomic sums, in any order


def test_cuda_graphs() -> None:
    q, k, v = (x.detach() for x in inputs())
    scale = torch.tensor(0.2)  # a number on the CPU
    score = "s*c0"
    attention(q, k, v, 100, score, [scale])  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, 100, score, [scale])
    for x, new in zip((q, k, v), inputs(1), strict=True):
        x.copy_(new.detach())
    graph.replay()
    assert torch.equal(out, attention(q, k, v, 100, score, [scale]))


def test_reduce_overhead_trains() -> None:
    site = Site().cuda()
    compiled = torch.compile(site, mode="reduce-overhead")
    for seed in range(4):
        leaves = inputs(seed)
        expected = torch.autograd.grad(site(*leaves).float().square().sum(), leaves)
        found = torch.autograd.grad(compiled(*leaves).float().square().sum(), leaves)
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_export() -> None:
    site = Site().cuda().requires_grad_(False)
    leaves = tuple(x.detach() for x in inputs())
    assert torch.equal(torch.export.export(site, leaves).module()(*leaves), site(*leaves))


def test_a_package_with_the_kernels_inside_runs_without_us(tmp_path: Path) -> None:
    from kvt_compile.integrations.aot import kernels_inside

    site = Site().cuda().requires_grad_(False)
    leaves = tuple(x.detach() for x in inputs())
    with kernels_inside():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(site, leaves), package_path=str(tmp_path / "model.pt2")
        )
    torch.save(leaves, tmp_path / "inputs.pt")
    program = (
        "import sys, torch; folder, package = sys.argv[1:]\n"
        "found = torch._inductor.aoti_load_package(package)(*torch.load(folder + '/inputs.pt'))\n"
        "assert not any(name.startswith('kvt') for name in sys.modules)\n"
        "torch.save(found, folder + '/found.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), path], check=True, cwd=tmp_path)
    # the same keys; weights round otherwise, since Inductor contracts
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), site(*leaves))


def test_gradients_have_the_same_bits_every_time() -> None:
    leaves = inputs()
    results = [torch.autograd.grad(attention(*leaves, 100).float().square().sum(), leaves) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_deterministic_mode_covers_captured_gradients() -> None:
    site = Site().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        found = [torch.autograd.grad(site(*inputs()).float().square().sum(), site.bias)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_memory_grows_with_n_and_not_with_its_square() -> None:
    def peak(n: int) -> int:
        leaves = [torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attention(*leaves, n // 8).sum(), leaves)
        return torch.cuda.max_memory_allocated() - before

    _, short, long = [peak(n) for n in MEMORY]  # the first one compiles
    assert long <= 4.5 * short


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_row_kernels(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, device="cuda").requires_grad_()
    topk = shape[-1] // 2
    found, expected = (torch.ops.kvt.topk_softmax(scores, -1, topk, torch.float32, x) for x in ("triton", "aten"))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad(x, scores, grad) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_second_gpu_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    q, k, v = (x.detach().to("cuda:1") for x in inputs())
    assert torch.equal(
        attention(q, k, v, 100).cpu(), attention(q.to("cuda:0"), k.to("cuda:0"), v.to("cuda:0"), 100).cpu()
    )
