"""What test_triton_launch.py can see: faults put into kernels and launches, one at a time, each beside what passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from launching import run
from spec_calls import call_of
from stub_gpu import Stub, stub
from triton_specs import VIT

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.launch import Launcher
from kvt_compile.kernels.triton.module import load
from kvt_compile.kernels.triton.targets import SHARED

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stub driver is for machines without a GPU")
SMALL = Blocks("streaming", 16, 16, 4, 1)
REAL = "REAL = tl.constexpr(tl.float32)"
NAN = 'float("nan")'


@pytest.fixture
def gpu() -> Iterator[Stub]:
    with stub("sm_90") as found:
        yield found


class Faulty(Launcher):
    """Launches kernels with changes in their text, an argument replaced, or another grid."""

    def __init__(self, *changes: tuple[str, str], grid: tuple[int, ...] = (), **arguments: Any) -> None:
        super().__init__(chooser=lambda launch: SMALL)
        self.changes, self.grid, self.arguments = changes, grid, arguments
        self.loaded: dict[str, Any] = {}

    def kernel(self, spec: KernelSpec | SoftmaxSpec, part: str) -> Any:
        text = module_source(spec)
        for old, new in self.changes:
            assert old in text
            text = text.replace(old, new)
        if text not in self.loaded:
            self.loaded[text] = load(text)
        return getattr(self.loaded[text], part)

    def launch(self, kernel: Any, programs: int, arguments: Sequence[Any], *rest: Any) -> Any:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | self.arguments
        launched = kernel if not self.grid else _OnGrid(kernel, self.grid)
        return super().launch(launched, programs, list(named.values()), *rest)


class _OnGrid:
    def __init__(self, kernel: Any, grid: tuple[int, ...]) -> None:
        self.kernel, self.grid = kernel, grid

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        return self.kernel[self.grid]


def launch(gpu: Stub, *changes: tuple[str, str], queries: int = 20, **faults: Any) -> None:
    run(gpu, call_of(VIT, queries, 30), Faulty(*changes, **faults))


def test_nothing_is_wrong_without_a_fault(gpu: Stub) -> None:
    launch(gpu)
    assert gpu.last.kernel == "forward"
    assert (gpu.last.grid, gpu.last.threads) == ((2 * 2 * 2, 1, 1), 128)
    assert gpu.last.shared > 0


# --- globals ----------------------------------------------------------------------------------------------------------


def test_a_global_that_does_not_equal_itself(gpu: Stub) -> None:
    put_back = (REAL, f"NAN = tl.constexpr({NAN})\n{REAL}")
    launch(gpu, put_back)  # one that no kernel reads does no harm
    with pytest.raises(RuntimeError, match="Global variable NAN has changed"):
        launch(gpu, (f"(invalid, {NAN}", "(invalid, NAN"), put_back)


def test_a_global_that_is_no_constant(gpu: Stub) -> None:
    with pytest.raises(Exception, match="Cannot access global variable REAL"):
        launch(gpu, (REAL, "REAL = 32"))


# --- argument types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"q_ptr": [1, 2]}, TypeError),
        ({"threshold_ptr": "text"}, TypeError),
        ({"q_ptr": 7}, triton.CompilationError),
        ({"nk": 30.5}, triton.CompilationError),
        ({"nk": torch.tensor(30)}, triton.CompilationError),
        ({"topk": None}, triton.CompilationError),
        ({"nk": 2**70}, OverflowError),
    ],
    ids=str,
)
def test_an_argument_of_another_type(arguments: dict[str, Any], error: type[Exception], gpu: Stub) -> None:
    with pytest.raises(error):
        launch(gpu, **arguments)


# --- specialisation ---------------------------------------------------------------------------------------------------


def test_a_kernel_that_one_query_breaks(gpu: Stub) -> None:
    """A parameter that is 1 is a Python number in the kernel, and has no methods."""
    fault = ("    h = h.to(INDEX)\n", "    h = h.to(INDEX)\n    nq = nq.to(INDEX)\n")
    launch(gpu, fault)
    with pytest.raises(triton.CompilationError):
        launch(gpu, fault, queries=1)


@pytest.mark.parametrize("faulty", [False, True])
def test_a_kernel_that_every_k_compiles_anew(faulty: bool, gpu: Stub) -> None:
    names = 'do_not_specialize=["topk", "fewest", "most"]'
    launcher = Faulty((names, "do_not_specialize=[]" if faulty else names))
    for topk in (5, 1, 16):
        run(gpu, call_of(VIT, 20, 30, topk=topk), launcher)
    assert gpu.specialised == ["forward"] * (3 if faulty else 1)


# --- limits of the chip -----------------------------------------------------------------------------------------------


def test_shared_memory_beyond_the_chip_s() -> None:
    wide = KernelSpec("bfloat16", "bfloat16", 128, 128, score="s")
    tiles = Launcher(chooser=lambda launch: Blocks("streaming", 16, 128, 4, 4))
    with stub("sm_90") as gpu:  # 227 KiB a program
        run(gpu, call_of(wide, 20, 30), tiles)
        assert SHARED["sm_80"] < gpu.last.shared <= SHARED["sm_90"]
    with stub("sm_80") as gpu, pytest.raises(triton.runtime.OutOfResources, match="shared memory"):  # 163 KiB
        run(gpu, call_of(wide, 20, 30), tiles)


@pytest.mark.parametrize("grid", [(2**31,), (1, 2**16), (1, 1, 2**16)], ids=str)
def test_a_grid_that_is_too_large(grid: tuple[int, ...], gpu: Stub) -> None:
    launch(gpu, grid=(*grid[:-1], grid[-1] - 1))
    with pytest.raises((RuntimeError, OverflowError), match=r"invalid argument|greater than maximum"):
        launch(gpu, grid=grid)
