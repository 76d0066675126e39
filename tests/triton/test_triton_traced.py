"""k-NN attention as Triton kernels in the graph that AOTInductor compiles for an NVIDIA GPU: which launches, that they
compute what the reference does, and that what Inductor writes of them compiles.  Nothing here needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from oracles import assert_close
from torch import Tensor, nn
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as inductor_text
from torch.export import Dim
from traced import OnCpu, launches, trace

from kvt_compile.integrations.aot import kernels_inside
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec
from kvt_compile.kernels.triton.candidates import default
from kvt_compile.kernels.triton.compile import compile_kernel
from kvt_compile.kernels.triton.module import load, module

kvt = torch.ops.kvt
BIASED = "0.25*s + c0[h, i, j]"


class Attention(nn.Module):
    def __init__(self, score: str, topk: int = 9, dropout_p: float = 0.0, select: str = "") -> None:
        super().__init__()
        self.score, self.topk, self.dropout_p, self.select = score, topk, dropout_p, select

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor, lowering: str = "auto") -> tuple[Tensor, ...]:
        seed = torch.zeros(1, dtype=torch.int64, device=q.device) if self.dropout_p else None
        out: tuple[Tensor, ...] = kvt.attention(
            q, k, v, list(captured), self.score, "p", self.topk, [], self.dropout_p, seed, lowering, 0.0, None,
            self.select,
        )  # fmt: skip
        return out


class Rows(nn.Module):
    def forward(self, scores: Tensor, lowering: str = "auto") -> tuple[Tensor]:
        return (kvt.topk_softmax(scores, -1, 5, torch.float32, lowering),)


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> list[Tensor]:
    shapes = [(2, 2, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16), *([(2, queries, keys)] if bias else [])]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


torch.manual_seed(0)  # the inputs are drawn when the table is made
BATCH = {0: Dim("batch", max=1000)}
CASES: dict[str, tuple[nn.Module, list[Tensor], Any, str, bool]] = {
    # site, inputs, what is symbolic, its kernel, whether a tile holds whole rows
    "plain, whole rows": (Attention("0.25*s"), tensors(19, 21, torch.bfloat16), None, "forward", True),
    "plain, tiles": (Attention("0.25*s"), tensors(35, 70), None, "forward", False),
    "bias, whole rows": (Attention(BIASED), tensors(19, 21, torch.bfloat16, bias=True), None, "forward", True),
    "bias, tiles": (Attention(BIASED), tensors(35, 70, bias=True), None, "forward", False),
    "nothing but a bias": (
        Attention("s + c0[h, i, j]"),
        [0.5 * x for x in tensors(35, 40, bias=True)],  # scores as large as the others'
        None,
        "forward",
        False,
    ),
    "soft-cap, mask": (Attention("where(le(j, i), 5.0*tanh(0.2*s), -oo)"), tensors(35, 35), None, "forward", False),
    "symbolic batch": (Attention("0.25*s"), tensors(19, 21), (BATCH,) * 3, "forward", False),
    "scores kept": (Rows(), [torch.randn(3, 6, 40)], None, "softmax", True),
    "scores kept, symbolic rows": (Rows(), [torch.randn(3, 6, 40)], (BATCH,), "softmax", True),
}


SLOW = ("plain, tiles", "bias, whole rows", "nothing but a bias")  # like others, and a few seconds each


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES])
def test_launches_compute_what_the_reference_does(case: str) -> None:
    site, inputs, dynamic, kernel, whole = CASES[case]
    with kernels_inside():
        graph = trace(site, inputs, dynamic)
    assert not any("kvt" in str(node.target) for node in graph.graph.nodes)
    ((found_kernel, arguments, _),) = launches(graph)
    assert (found_kernel.__name__, arguments["RESIDENT"]) == (kernel, whole)
    found = OnCpu(graph).run(*inputs)[0]
    exact, plain = (
        site(*(x.to(dtype) for x in inputs), lowering=lowering)[0]
        for dtype, lowering in ((torch.float64, "reference"), (torch.float32, "aten"))
    )
    assert_close("out", found, exact, plain.to(found.dtype))
    if dynamic is not None:
        more = [torch.cat([x, x]) for x in inputs]
        assert torch.equal(OnCpu(graph).run(*more)[0], torch.cat([found, found]))


def test_arguments_and_grid() -> None:
    inputs = tensors(300, 500, torch.bfloat16, bias=True)
    with kernels_inside():
        graph = trace(Attention(BIASED, topk=100), inputs)
    ((kernel, arguments, grid),) = launches(graph)
    blocks = default(KernelSpec.of(*inputs[:3], inputs[3:], BIASED, "p", 0, 0.0), "forward", 300, 500, hip=False)
    assert (arguments["ROWS"], arguments["COLS"], arguments["STAGES"]) == (blocks.rows, blocks.cols, blocks.stages)
    assert arguments["num_warps"] == blocks.warps
    assert [tuple(x) for x in grid] == [(-(-300 // blocks.rows) * 4, 1, 1)]
    assert (arguments["topk"], arguments["nq"], arguments["nk"], arguments["heads"]) == (100, 300, 500, 2)
    assert arguments["q_stride1"] == 300 * 16
    assert str(arguments["INDEX"]) == "int32"
    (node,) = (x for x in graph.graph.nodes if "triton_kernel_wrapper" in str(x.target))
    assert node.kwargs["tensors_to_clone"] == ["out_ptr", "logsumexp_ptr", "threshold_ptr"]  # torch saw what is written
    assert set(arguments) >= set(kernel.arg_names)


def test_sizes_that_may_be_anything_take_64_bits_and_tiles() -> None:
    inputs = tensors(19, 21, torch.bfloat16)
    queries, keys = {2: Dim("queries")}, {2: Dim("keys")}
    with kernels_inside():
        graph = trace(Attention("0.25*s"), inputs, (queries, keys, keys))
    ((_, arguments, _),) = launches(graph)
    assert (str(arguments["INDEX"]), arguments["RESIDENT"]) == ("int64", False)


@pytest.mark.parametrize(
    ("site", "device", "reason"),
    [
        (Attention("0.25*s", dropout_p=0.5), "cpu", "it has dropout"),
        (Attention("erf(s)"), "cuda", "erf of a score, whose library code may round otherwise from place to place"),
        (Attention("0.25*s", dropout_p=0.5), "cuda", "it has dropout"),
        (Attention("0.25*s", select="sinks(4)"), "cuda", "its selection makes lists of tiles"),
    ],
    ids=["cpu", "erf", "dropout", "selection"],
)
def test_what_stays_is_named(site: nn.Module, device: str, reason: str) -> None:
    with kernels_inside(), pytest.warns(RuntimeWarning, match=rf"kvt::attention stays in the package.*: {reason}"):
        graph = trace(site, tensors(19, 21), device=device)
    assert any("kvt.attention" in str(node.target) for node in graph.graph.nodes)


def test_without_the_context_nothing_is_expanded() -> None:
    for site, inputs in ((Attention("0.25*s"), tensors(19, 21)), (Rows(), [torch.randn(3, 40)])):
        assert not launches(trace(site, inputs))


@pytest.mark.parametrize("score", [BIASED, pytest.param("50.0*tanh(0.02*s)", marks=pytest.mark.slow)])
def test_what_inductor_writes_of_a_kernel_compiles(score: str) -> None:
    """Inductor collects a kernel's helpers and constants and writes them down again; nothing may be missing."""
    captured = (CapturedSpec("float32", 3),) if "c0" in score else ()
    spec = KernelSpec("bfloat16", "bfloat16", 64, 64, score=score, captured=captured)
    ours = module(spec, contracting=True).forward
    text = inductor_text(ours)
    again = load(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{text}").forward
    blocks = default(spec, "forward", 1024, 1024, hip=False)
    first, second = (compile_kernel(spec, "forward", blocks, "sm_90", x, fusion=True) for x in (ours, again))
    assert without_places(first.asm["ptx"]) == without_places(second.asm["ptx"])


def without_places(ptx: str) -> list[str]:
    """Instructions, without what says from which line they are."""
    lines = (line.strip() for line in ptx.partition(".section")[0].splitlines())
    return [x for x in lines if x and not x.startswith((".loc", ".file", "//", "$L", ".b"))]
