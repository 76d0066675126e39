"""The argument structure of a kernel: one list of (C type, name), printed by the generator and packed by the launch."""

from __future__ import annotations

from functools import lru_cache

from kvt_compile.kernels.c.scalar import ELEMENTS
from kvt_compile.kernels.spec import KernelSpec

MATRICES = ("q", "k", "v", "grad_out")


SOFTMAX_FIELDS = (
    ("const void *", "input"),
    ("const void *", "grad"),
    ("void *", "output"),
    ("int64_t", "outer"),
    ("int64_t", "n"),
    ("int64_t", "inner"),
    ("int64_t", "topk"),
    ("int64_t", "threads"),
)
"""Of the row kernel: scores [outer, n, inner], contiguous."""


@lru_cache(maxsize=1024)
def fields(spec: KernelSpec) -> tuple[tuple[str, str], ...]:
    """Every field is 8 bytes: a pointer, an int64_t or a double."""
    real = "double" if spec.dtype == "float64" else "float"
    q, v = ELEMENTS[spec.dtype], ELEMENTS[spec.value_dtype]
    result = [
        (f"const {q} *", "q"),
        (f"const {q} *", "k"),
        (f"const {v} *", "v"),
        (f"const {v} *", "grad_out"),
        (f"{v} *", "out"),
        (f"{real} *", "lse"),
        (f"{real} *", "threshold"),
        (f"{q} *", "dq"),
        (f"{q} *", "dk"),
        (f"{v} *", "dv"),
        *(("int64_t", x) for x in ("B", "Hq", "Hk", "Nq", "Nk", "topk", "threads", "seed", "drop_below")),
        ("double", "keep_scale"),
        *(("int64_t", x) for x in ("chunks", "split_b", "split_h", "split_chunks", "copies")),
        *(("int64_t", f"{x}_stride{dim}") for x in MATRICES for dim in range(4)),
        *(("int64_t", f"n{x}") for x in range(spec.sizes)),
    ]
    for number, captured in enumerate(spec.captured):
        result.append((f"const {ELEMENTS[captured.dtype]} *", f"c{number}"))
        result += [("int64_t", f"c{number}_stride{dim}") for dim in range(captured.ndim)]
        result += [("int64_t", f"c{number}_size{dim}") for dim in range(captured.ndim)]
        if captured.is_float:
            result.append((f"{real} *", f"dc{number}"))
    return tuple(result)
