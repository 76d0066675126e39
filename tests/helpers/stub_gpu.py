"""Triton's real launch path on a machine without a GPU: binder, compiler, assembler and C launcher run as they do for a
GPU, on CPU tensors, over a driver library of our own (stub_gpu.c) that checks what it is asked for and runs nothing.

    with stub_gpu.stub("sm_90") as gpu:              # any name of targets.TARGETS that is NVIDIA's
        gpu.lowering()                               # the lowering "triton", taking CPU tensors
        with gpu.registered():                       # "triton" of the ops takes CPU tensors,
            torch.ops.kvt.attention(...)             # forward and backward
        gpu.launches                                 # how many launches the driver accepted
        gpu.last                                     # name, grid, threads, bytes of shared memory of the last one
        gpu.specialised                              # kernels that this process had not for such arguments
        gpu.compiled                                 # (kernel, seconds) of those that Triton's cache had not either

It shows what the interpreter and cross-compilation cannot: arguments that the launcher refuses, globals that Triton
compares before a launch, kernels that fail in the assembler, shared memory over the chip's limit, a grid that is too
large.  It shows nothing about numbers or speed: outputs are what memory held.

Needs a C compiler (as Triton's launcher does by itself) and no GPU: a process has one libcuda.  Raises RuntimeError
where torch finds a GPU, or where another libcuda was loaded.  The compiled stub is in Triton's cache, with what Triton
compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from kvt_compile.kernels import lowerings
from kvt_compile.kernels.triton.choose import choose
from kvt_compile.kernels.triton.launch import Chooser, Launcher
from kvt_compile.kernels.triton.lowering import TritonLowering
from kvt_compile.kernels.triton.targets import SHARED, TARGETS

SOURCE = Path(__file__).with_suffix(".c")
FILE = "libcuda.so.1"


@dataclass(frozen=True)
class Launched:
    """What the driver was asked to launch."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


@dataclass
class Stub:
    """The stub driver while it is Triton's."""

    target: str
    library: ctypes.CDLL
    specialised: list[str] = field(default_factory=list)
    compiled: list[tuple[str, float]] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return int(self.library.stub_launches())

    @property
    def last(self) -> Launched:
        numbers = [int(self.library.stub_last(n)) for n in range(5)]
        return Launched(self.library.stub_name().decode(), (numbers[0], numbers[1], numbers[2]), *numbers[3:])

    def lowering(self, chooser: Chooser = choose) -> TritonLowering:
        """The lowering "triton", of CPU tensors."""
        return TritonLowering(Launcher(chooser=chooser), devices=("cpu",))

    @contextmanager
    def registered(self, chooser: Chooser = choose) -> Iterator[None]:
        """`lowering` under the name "triton"."""
        undo = lowerings.register("triton", self.lowering(chooser))
        try:
            yield
        finally:
            undo()


@contextmanager
def stub(target: str = "sm_90") -> Iterator[Stub]:
    """Triton launches on the stub.  target: the chip that it seems to be.  Not for several threads at once."""
    backend, architecture, _ = TARGETS[target]
    if backend != "cuda":
        raise ValueError(f"{target} is no NVIDIA GPU")
    library = _library()
    found = Stub(target, library)
    runtime, compilation = triton.runtime.driver, triton.knobs.compilation

    def listener(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        found.specialised.append(src.name)
        if not cache_hit:
            found.compiled.append((src.name, times.total / 1e6))

    before = runtime._active, compilation.listener
    library.stub_chip(*divmod(int(architecture), 10), SHARED[target])
    runtime.set_active(_driver(target))
    compilation.listener = listener
    try:
        yield found
    finally:
        runtime._active, compilation.listener = before


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The stub, compiled and loaded as this process's libcuda."""
    if torch.cuda.is_available():
        raise RuntimeError("torch finds a GPU here, so that the stub driver would not be used: run on the GPU instead")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = SOURCE.read_bytes()
    cache = get_cache_manager(hashlib.sha256(source + (include / "cuda.h").read_bytes()).hexdigest())
    path = cache.get_file(FILE)
    if path is None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("no C compiler: Triton's launcher needs one too; install gcc, or name one with CC")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, FILE)
            flags = ["-shared", "-fPIC", "-O1", f"-I{include}", f"-Wl,-soname,{FILE}"]
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built)], check=True)
            path = cache.put(built.read_bytes(), FILE, binary=True)
    library = ctypes.CDLL(path)
    # whoever asks for libcuda from now on gets the one of that name which is loaded already
    if ctypes.CDLL(FILE)._handle != library._handle:
        raise RuntimeError(f"another {FILE} was loaded before: use the stub driver in a process of its own")
    library.stub_name.restype = ctypes.c_char_p
    _unload_only_with_a_driver()
    triton.knobs.nvidia.libcuda_path = str(Path(path).parent)  # where the launcher is linked against it
    return library


def _unload_only_with_a_driver() -> None:
    """Triton 3.8 unloads a kernel that is collected, by the driver of that moment: after the stub there is none."""
    unload = getattr(CompiledKernel, "__del__", None)
    if unload is not None:
        CompiledKernel.__del__ = lambda kernel: unload(kernel) if triton.runtime.driver._active else None


@lru_cache(maxsize=len(TARGETS))
def _driver(target: str) -> Any:
    """Triton's own driver, but for what it asks torch.  Every target has a device number, by which Triton keeps what it
    compiled."""
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    number, capability = list(TARGETS).index(target), divmod(int(TARGETS[target][1]), 10)
    driver.get_current_device = lambda: number
    driver.set_current_device = lambda device: None
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=None: capability
    return driver
