"""KernelSpec -> C kernel for a CPU, generated, compiled once, loaded with ctypes.

    generate   spec -> C source          toolchain   compiler and flags       launch     tensors -> arguments -> tensors
    program    score expression -> C     cache       source -> library        lowering   the lowering "c" of the ops
    traced     an operator in a graph -> a C function that Inductor's C++ calls

`source(spec)` is what `explain` prints.  The kernel itself is explained in docs/cpu.md.
"""

from __future__ import annotations

from kvt_compile.kernels.c.generate import source
from kvt_compile.kernels.c.lowering import LOWERING, CLowering, refusal
from kvt_compile.kernels.c.settings import Settings

__all__ = ["LOWERING", "CLowering", "Settings", "refusal", "source"]
