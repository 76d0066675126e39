"""The argument structure of a kernel: one list of (C type, name), printed by the generator and packed by the launch."""

from __future__ import annotations

from functools import lru_cache

from kvt_compile.kernels.c.scalar import ELEMENTS
from kvt_compile.kernels.op.spec import KernelSpec

MATRICES = ("q", "k", "v", "grad_out")
DRAW = ("draw_first", "draw_b", "draw_h", "draw_i")
"""Where dropout draws: `AttentionCall.draw`."""


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


LISTED_FIELDS = (
    ("const int32_t *", "lane_query"),
    ("const int32_t *", "lane_count"),
    ("const int64_t *", "list_start"),
    ("const int32_t *", "list_block"),
    ("const int64_t *", "block_start"),
    ("const int64_t *", "run"),
    ("const uint32_t *", "bits"),
    ("int64_t", "tiles"),
    ("int64_t", "own_tiles"),
    ("int64_t", "per_batch"),
    ("int64_t", "per_head"),
    ("int64_t", "longest"),
)
"""Of a kernel with lists of keys: the arrays of `tiles.TileLists`."""


@lru_cache(maxsize=1024)
def call_fields(spec: KernelSpec) -> tuple[tuple[str, str], ...]:
    """What differs from call to call: pointers, threads, dropout.  Every field is 8 bytes: a pointer, an int64_t or a
    double."""
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
        *(("int64_t", x) for x in ("threads", "seed", "drop_below", *DRAW)),
        ("double", "keep_scale"),
    ]
    for number, captured in enumerate(spec.captured):
        result.append((f"const {ELEMENTS[captured.dtype]} *", f"c{number}"))
        if captured.is_float:
            result.append((f"{real} *", f"dc{number}"))
    return (*result, *LISTED_FIELDS) if spec.select else tuple(result)


@lru_cache(maxsize=1024)
def shape_fields(spec: KernelSpec) -> tuple[tuple[str, str], ...]:
    """What shapes, strides and topk decide: packed once for all calls that agree in them."""
    names = ["B", "Hq", "Hk", "Nq", "Nk", "topk", "chunks", "split_b", "split_h", "split_chunks", "copies"]
    names += [f"{x}_stride{dim}" for x in MATRICES for dim in range(4)]
    names += [f"n{x}" for x in range(spec.sizes)]
    for number, captured in enumerate(spec.captured):
        names += [f"c{number}_{what}{dim}" for what in ("stride", "size") for dim in range(captured.ndim)]
    return tuple(("int64_t", x) for x in names)


def fields(spec: KernelSpec) -> tuple[tuple[str, str], ...]:
    """The whole structure."""
    return call_fields(spec) + shape_fields(spec)
