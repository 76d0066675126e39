"""What C++ that Inductor writes calls: one C function for each spec, on torch's own handles, with its own checks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import _aoti
from traced import trace

from kvt_compile.kernels.c.generate import source_inside
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.c.toolchain import find_compiler
from kvt_compile.kernels.inside import kernels_inside
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec

SCORE = "where(le(c1[i], j), 0.3*s, -oo) + c0[b % n0, h, j]"
SPEC = KernelSpec(
    "float32", "float32", 8, 24, SCORE, captured=(CapturedSpec("float32", 3), CapturedSpec("int32", 1)), sizes=1
)
Function = Callable[..., list[Tensor] | None]


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Function:
    """The C function of SPEC: tensors, k and a size -> what it made of them; None where it refuses."""
    folder: Path = tmp_path_factory.mktemp("inside")
    (folder / "x.c").write_text(source_inside(SPEC, "x"))
    settings = from_environment()
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    flags = (
        "-Wall",
        "-Werror",
        "-Wextra",
        "-Wno-unused",
        "-Wno-unused-parameter",
        "-Wl,--no-as-needed",
        str(torch_library),
    )
    find_compiler(settings.compiler, settings.target).build(folder / "x.c", folder / "x.so", flags)
    entry = ctypes.CDLL(str(folder / "x.so")).aoti_torch_cpu_x

    def run(tensors: Sequence[Tensor], topk: int, size: int) -> list[Tensor] | None:
        handles = _aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        results = (ctypes.c_void_p * 3)()
        places = [ctypes.byref(results, 8 * n) for n in range(3)]
        pointers = [ctypes.c_void_p(address(x)) for x in handles]
        failed = entry(*pointers, ctypes.c_int64(topk), ctypes.c_int64(size), *places)
        assert bool(failed) == (results[0] is None)
        return None if failed else [_aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(x)) for x in results]

    return run


def address(handle: Any) -> int:
    """The pointer in a capsule."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(handle, None))


def capsule(pointer: int) -> Any:
    """A capsule of a pointer."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, None, None)


def tensors(batch: int = 2, queries: int = 37, keys: int = 50) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, queries, 4, 8).transpose(1, 2)
    k, v = (torch.randn(batch, 2, keys, n) for n in (8, 24))
    return [q, k, v, torch.randn(2, 4, keys), torch.randint(0, 9, (queries,), dtype=torch.int32)]


class Site(nn.Module):
    """One site, of SPEC."""

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(by_the_operator(x, 7, 2))


def by_the_operator(x: Sequence[Tensor], topk: int, size: int) -> list[Tensor]:
    return list(torch.ops.kvt.attention(*x[:3], list(x[3:]), SCORE, "p", topk, [size], 0.0, None, "c"))


@pytest.mark.parametrize(
    "sizes", [{}, {"queries": 5}, {"batch": 0}, {"queries": 0}, {"keys": 0}], ids=lambda x: str(x) if x else "plain"
)
@pytest.mark.parametrize("topk", [7, 1000])
def test_it_is_the_operator(function: Function, sizes: dict[str, int], topk: int) -> None:
    x = tensors(**sizes)
    for ours, theirs in zip(function(x, topk, 2), by_the_operator(x, topk, 2), strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)


def changed(n: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [change(x) if m == n else x for m, x in enumerate(tensors())]


@pytest.mark.parametrize(
    ("x", "topk", "size", "said"),
    [
        (changed(0, lambda x: x.double()), 7, 2, "q that is no float32"),
        (changed(0, lambda x: x[0]), 7, 2, "q that is no float32"),
        (changed(1, lambda x: x.to_sparse()), 7, 2, "k that is no float32"),
        (changed(2, lambda x: x.to("meta")), 7, 2, "v that is no float32"),
        (changed(1, lambda x: x[..., :7]), 7, 2, "keys of another head size"),
        (changed(2, lambda x: x[:, :, 1:]), 7, 2, "values that do not fit"),
        (changed(0, lambda x: x[:, :3]), 7, 2, "queries that do not fit"),
        (changed(3, lambda x: x[..., :49]), 7, 2, "smaller than its indices"),
        (changed(4, lambda x: x.long()), 7, 2, "captured tensor 1 that is no int32"),
        (changed(4, lambda x: x[:0]), 7, 2, "an empty captured tensor"),
        (tensors(), 0, 2, "a topk below 1"),
        (tensors(), 7, 0, "a size below 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_would_read_wrong_is_refused(
    function: Function, capfd: pytest.CaptureFixture[str], x: list[Tensor], topk: int, size: int, said: str
) -> None:
    assert function(x, topk, size) is None
    assert said in capfd.readouterr().err


def test_memory_that_was_freed_is_refused(function: Function) -> None:
    x = tensors()
    x[1].untyped_storage().resize_(0)
    assert function(x, 7, 2) is None


def test_in_python_it_is_the_operator_too() -> None:
    x = tensors()
    with kernels_inside():
        graph = trace(Site(), x, device="cpu")
    (target,) = (node.target for node in graph.graph.nodes if "attention" in str(node.target))
    assert target.namespace == "kvt_c"  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(graph(*x), by_the_operator(x, 7, 2), strict=True))
