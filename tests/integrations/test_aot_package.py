"""AOTInductor packages with k-NN attention, on a CPU: compiled, loaded and run.  Without `kernels_inside` whoever loads
one has imported `kvt_compile.kernels.ops`.  What C++ calls is tested by itself in tests/c/test_c_traced.py; packages
for a GPU are in test_triton_traced.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.export import Dim, ExportedProgram, export

import kvt_compile
from kvt_compile.integrations.aot import kernels_inside

pytestmark = pytest.mark.slow  # a C++ compiler at work for ten seconds a package
kvt = torch.ops.kvt


class TwoSites(nn.Module):
    """One site captures nothing, the other a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(2, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
        v = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v
        v = (q @ k.transpose(-1, -2) * 0.25 + self.bias).softmax(-1) @ v
        return v.transpose(1, 2).flatten(2)


class Calls(nn.Module):
    """Calls of the operators with a size known only at run time, and with the scores kept."""

    def forward(self, x: Tensor) -> Tensor:
        y = kvt.attention(x, x, x, [x[0, 0]], "s + c0[b % n0, j]", "p", 3, [x.shape[0] // 2], 0.0, None, "auto")[0]
        return kvt.topk_softmax(y, -1, 3, torch.float32, "auto")


def package(program: ExportedProgram, folder: Path) -> Any:
    """Compiles, saves, loads."""
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(path)


def test_a_rewritten_program_runs_from_its_package(tmp_path: Path) -> None:
    model, batch = TwoSites().eval(), {0: Dim("batch", min=2, max=64)}
    inputs = (torch.randn(4, 9, 32),)
    result = kvt_compile.rewrite(export(model, inputs, dynamic_shapes=(batch,)), *inputs, topk=4)
    assert result.program is not None
    targets = [node.target for node in result.program.graph.nodes]
    assert targets.count(kvt.attention.default) == 2
    found = package(result.program, tmp_path)
    for x in (*inputs, torch.randn(7, 9, 32)):
        torch.testing.assert_close(found(x), result.module(x))
        assert not torch.allclose(found(x), model(x))  # the model keeps every key


RUN = """
import sys, torch
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), expected)
assert not any(name.startswith("kvt") for name in sys.modules)
"""


def test_a_package_with_the_kernels_inside_runs_without_us(tmp_path: Path) -> None:
    model, batch = TwoSites().eval(), {0: Dim("batch", min=2, max=64)}
    inputs = (torch.randn(4, 9, 32),)
    result = kvt_compile.rewrite(export(model, inputs, dynamic_shapes=(batch,)), *inputs, topk=4)
    with kernels_inside():
        package(result.program, tmp_path)
    x = torch.randn(7, 9, 32)
    torch.save((x, result.module(x)), tmp_path / "x.pt")
    command = [sys.executable, "-c", RUN, str(tmp_path / "model.pt2"), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_inductor_writes_in_cpp_calls_the_kernel() -> None:
    model, x = TwoSites().eval().requires_grad_(False), torch.randn(4, 9, 32)
    plain, cpp = (torch.compile(model, backend="kvt", options={"topk": 4, "cpp_wrapper": y}) for y in (False, True))
    found, (code,) = run_and_get_code(cpp, x)
    assert code.count("aoti_torch_cpu_attention_") >= 2
    assert "kvt.attention" not in code
    torch.testing.assert_close(found, plain(x))


@pytest.mark.parametrize("select", ["window(2)", "regions(2, 2)", "keys(4)"])
def test_a_selection_runs_from_its_package(tmp_path: Path, select: str) -> None:
    model, batch = TwoSites().eval(), {0: Dim("batch", min=2, max=64)}
    inputs = (torch.randn(4, 9, 32),)
    program = export(model, inputs, dynamic_shapes=(batch,))
    result = kvt_compile.rewrite(program, *inputs, select=select, grid=(3, 3))
    assert result.report.counts["fused"] == 2
    assert result.program is not None
    found = package(result.program, tmp_path)
    for x in (*inputs, torch.randn(7, 9, 32)):
        torch.testing.assert_close(found(x), result.module(x))
        assert not torch.allclose(found(x), model(x))


def test_operators_run_from_a_package(tmp_path: Path) -> None:
    x = torch.randn(4, 2, 5, 8)
    program = export(Calls(), (x,), dynamic_shapes=({0: 2 * Dim("half", min=2, max=8)},))
    found = package(program, tmp_path)
    for y in (x, torch.randn(6, 2, 5, 8)):
        assert torch.equal(found(y), Calls()(y))
