"""KernelSpec -> the C source of its kernel, forward and backward; SoftmaxSpec -> the row kernel.

    vector  element  args  transpose  product  [pairs]  math  score  select  [dropout]  forward  backward

The text depends on the spec alone, not on the machine: what differs between CPUs is decided by the preprocessor and the
compiler's flags.  Templates are the parts in `templates/`; each is plain C with few holes.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Any

import jinja2

from kvt_compile.kernels.c.gradients import score_gradient, weight_gradient
from kvt_compile.kernels.c.layout import SOFTMAX_FIELDS, fields
from kvt_compile.kernels.c.program import Builder, Program
from kvt_compile.kernels.c.scalar import ELEMENTS, ScalarPrinter
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.expressions import NotGenerated
from kvt_compile.kernels.op.captured import unclamped
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec, dtype_name
from kvt_compile.kernels.tiles import check_conditioned

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("kvt_compile.kernels.c"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)
STACK = 1 << 20
"""Bytes of a stack that a kernel's blocks may take; threads have 8 MB, or 2."""
QUICK_PASSES = 10
"""Interpolating passes before a tile is finished carefully; 16 rows of normal scores take 7.8 to 8.4 (measured)."""

MOST_KEYS = 2**40
"""Expanded keys need no memory, but scratch of this size does, and beyond it a kernel's sizes would leave 64 bits."""
_EXTENTS = {"b": "a.B", "h": "a.Hq", "i": "a.Nq", "j": "a.Nk"}


@lru_cache(maxsize=256)
def source(spec: KernelSpec | SoftmaxSpec) -> str:
    """The C text; the same for every spec that differs only in `needs_grad`.  Raises NotGenerated with the reason."""
    if isinstance(spec, SoftmaxSpec):
        return _softmax(spec)
    return _attention(spec)


def source_inside(spec: KernelSpec, name: str) -> str:
    """The C text of a forward that code written by Inductor calls, by the name `aoti_torch_cpu_<name>`."""
    return _attention(spec, name)


def _attention(spec: KernelSpec, name: str = "") -> str:
    check_conditioned(spec)
    scalar = ScalarPrinter(spec)
    score = Builder(scalar).build([spec.score_expression])
    weight = Builder(scalar).build([spec.weight_expression]) if spec.weight != "p" else None
    score_back, score_scatter = score_gradient(spec, scalar)
    weight_back, weight_scatter = weight_gradient(spec, scalar)
    programs = [x for x in (score, weight, score_back, weight_back) if x is not None]
    _check_stack(spec, programs, len(score_scatter) + len(weight_scatter))
    return _render(
        "attention.c.jinja",
        spec=spec,
        types=(spec.dtype, spec.value_dtype, *(c.dtype for c in spec.captured)),
        matrix_types=(spec.dtype, spec.value_dtype),
        paired=_paired(spec),
        wide=scalar.wide,
        other=scalar.ctypes["other"],
        functions=sorted(set().union(*(x.functions for x in programs))),
        helpers=scalar.helpers,
        fields=fields(spec),
        block=block_size(spec),
        product_widths=sorted({spec.head_dim, spec.value_dim}),
        score=score,
        weight_program=weight,
        finishes=spec.dropout or spec.weight_of_numbers != language.p,
        score_back=score_back,
        weight_back=weight_back,
        scatters=(*score_scatter, *weight_scatter),
        score_scatter=score_scatter,
        weight_scatter=weight_scatter,
        keep_raw="s" in score_back.symbols,
        float_slots=[n for n, c in enumerate(spec.captured) if c.is_float],
        backward=not name,
        listed=bool(spec.select),
        name=name,
        dtypes=sorted({spec.dtype, spec.value_dtype, dtype_name(spec.accumulate), *(c.dtype for c in spec.captured)}),
        needed=[(slot, dim, _EXTENTS.get(of, least + 1)) for slot, dim, of, least in unclamped(spec)],
        most_keys=MOST_KEYS,
    )


def _softmax(spec: SoftmaxSpec) -> str:
    return _render(
        "softmax.c.jinja",
        spec=spec,
        types=(spec.dtype, spec.out_dtype),
        matrix_types=(),
        paired=False,
        wide="float64" in (spec.dtype, spec.out_dtype),
        functions=(),
        softmax_fields=SOFTMAX_FIELDS,
        backward=False,
    )


def _render(template: str, *, types: tuple[str, ...], matrix_types: tuple[str, ...], wide: bool, **values: Any) -> str:
    real_name = "float64" if wide else "float32"
    names = [x for x in ELEMENTS if x in (*types, real_name)]
    text = _ENVIRONMENT.get_template(template).render(
        real="double" if wide else "float",
        real_name=real_name,
        wide=wide,
        element=ELEMENTS.__getitem__,
        element_types=[(x, ELEMENTS[x]) for x in names],
        matrix_types=[x for x in names if x in matrix_types],
        interleave=_interleave,
        quantiles=_quantiles(),
        quick_passes=QUICK_PASSES,
        **values,
    )
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(x for n, x in enumerate(lines) if x or (n and lines[n - 1])) + "\n"


def _check_stack(spec: KernelSpec, programs: list[Program], scatters: int) -> None:
    """Values of every score of a block stand on a thread's stack, at most 128 bytes (M lanes) a key."""
    values, keys = sum(len(x.tiles) for x in programs) + scatters, block_size(spec) * (2 if _paired(spec) else 1)
    if values * 128 * keys > STACK:
        raise NotGenerated(f"{values} values of every score, {STACK // (128 * keys)} at most,")


def _paired(spec: KernelSpec) -> bool:
    """Whether a CPU that multiplies bfloat16 computes products of pairs (`templates/pairs.c.jinja`); keys of a list are
    gathered as reals."""
    return "bfloat16" in (spec.dtype, spec.value_dtype) and spec.dtype != "float64" and not spec.select


def block_size(spec: KernelSpec) -> int:
    """Keys in a block: K or V of a block fits in 24 KB of a 32 KB first-level cache; a multiple of every ROWS."""
    size = 8 if spec.dtype == "float64" else 4
    keys = 24 * 1024 // (size * max(spec.head_dim, spec.value_dim))
    return max(24, min(192, keys // 12 * 12))


def _interleave(lanes: int, start: int) -> str:
    """Indices that zip one half of two vectors: 0, 4, 1, 5 for the lower halves of two vectors of four."""
    return ", ".join(f"{x}, {x + lanes}" for x in range(start, start + lanes // 2))


def _quantiles() -> str:
    """z with P(Z >= z) = x / 64; the two infinite ends are cut at 1 / 4096."""
    tail = [min(max(x / 64, 1 / 4096), 1 - 1 / 4096) for x in range(65)]
    return ", ".join(f"{NormalDist().inv_cdf(1 - x):.4g}f" if x != 0.5 else "0" for x in tail)
