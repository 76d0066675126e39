"""The parameters of a spec's kernels: one list of names, printed by the generator and filled by the launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import derivative
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.select.text import parse
from kvt_compile.select.values import by_content, split

SMALLEST = 16
"""Features of the narrowest part: a matrix instruction takes no fewer."""
DRAW = ("draw_first", "draw_b", "draw_h", "draw_i")
"""Where dropout draws: `AttentionCall.draw`."""
KEPT = ("topk", "fewest", "most")
LISTS = ("list_ptr", "list_start_ptr", "head_tiles", "head_lists")
"""Where a tile's list is: `tiles.Walk`."""
PLACES = ("token_ptr", "may_ptr", "block_ptr", "width")
"""What stands at a place of a list."""


@dataclass(frozen=True)
class Part:
    """Features first .. first + width - 1 of a head; width is a power of two, the last part may reach beyond the
    end."""

    first: int
    width: int


@lru_cache(maxsize=256)
def parts(features: int, widest: int = 256) -> tuple[Part, ...]:
    """80 -> 64 + 16, 96 -> 64 + 32, 72 -> 64 + 16, 24 -> 32: parts of `widest` features, then at most three powers of
    two with the least padding."""
    whole = (features - 1) // widest
    widths = [widest] * whole + _split(features - whole * widest, 3)
    starts = [sum(widths[:n]) for n in range(len(widths))]
    return tuple(Part(first, width) for first, width in zip(starts, widths, strict=True))


def widest_part(spec: KernelSpec) -> int:
    """Of heads of more than 128 features that are multiplied as float32, 64 at a time fit into the registers of a
    GPU."""
    large = max(spec.head_dim, spec.value_dim) > 128
    return 64 if large and spec.dtype != "float64" and "float32" in (spec.dtype, spec.value_dtype) else 256


def reloads(spec: KernelSpec) -> bool:
    """Whether backward_kv reads its k and v again for every tile: as operands of a matrix instruction, each float32
    split in two, they would fill all registers by themselves."""
    return widest_part(spec) < 256


def _split(features: int, most: int) -> list[int]:
    whole = max(SMALLEST, 1 << (features - 1).bit_length())
    largest = whole // 2
    if most == 1 or whole == SMALLEST or whole - features < SMALLEST or largest < SMALLEST:
        return [whole]
    rest = _split(features - largest, most - 1)
    return [largest, *rest] if largest + sum(rest) < whole else [whole]


def tile_names(spec: KernelSpec) -> tuple[str, ...]:
    """What an expression may read of a tile, apart from s or p, i and j."""
    names = ["b", "h", "nq", "nk"]
    for n, captured in enumerate(spec.captured):
        names.append(f"c{n}_ptr")
        names += [f"c{n}_stride{dim}" for dim in range(captured.ndim)]
        names += [f"c{n}_size{dim}" for dim in range(captured.ndim)]
    return (*names, *(f"n{n}" for n in range(spec.sizes)))


@lru_cache(maxsize=1024)
def listing(spec: KernelSpec) -> Literal["tokens", "blocks"] | None:
    """What the lists of a selection name; None: every key is computed."""
    if not spec.select:
        return None
    allowed, _ = split(parse(spec.select))
    return None if allowed is None else "blocks" if by_content(allowed) else "tokens"


def online(spec: KernelSpec) -> bool:
    """Whether a forward may go over its keys once, with a running maximum: where nothing is ranked, and weights need
    not be normalised before the values are added up."""
    return listing(spec) is not None and not curved(spec)


def curved(spec: KernelSpec) -> bool:
    """Whether the weight expression is more than p times something, so that p has to be normalised before it."""
    return language.p in derivative(spec.weight_of_numbers, language.p).free_symbols


def listing_names(spec: KernelSpec) -> tuple[str, ...]:
    """Of a kernel with lists of tiles: the arrays of `tiles.Walk`."""
    found = listing(spec)
    if found is None:
        return ()
    own = ("head_lanes",) if spec.tables else ()
    places = ("may_ptr",) if found == "tokens" else ("block_ptr", "width")
    return ("lane_ptr", *own, "tiles", *LISTS, "token_ptr", *places)


def draw_names(spec: KernelSpec) -> tuple[str, ...]:
    """What dropout reads besides i and j; something in any case, as a tuple may not be empty."""
    return ("b", "h", "heads", "nq", "nk", *_dropout_names(spec))


def _dropout_names(spec: KernelSpec) -> tuple[str, ...]:
    return ("seed_ptr", "drop_below", "keep_scale", *DRAW) if spec.dropout else ()


def matrix_names(*matrices: str) -> tuple[str, ...]:
    """Pointers and strides: b, h, row, feature."""
    return tuple(
        name for x in matrices for name in (f"{x}_ptr", f"{x}_stride0", f"{x}_stride1", f"{x}_stride2", f"{x}_stride3")
    )


def _common(spec: KernelSpec) -> tuple[str, ...]:
    names = ("heads", "group", *tile_names(spec)[2:], *_dropout_names(spec), *listing_names(spec))
    return tuple(dict.fromkeys(names))


def forward_names(spec: KernelSpec) -> tuple[str, ...]:
    return (*matrix_names("q", "k", "v"), "out_ptr", "logsumexp_ptr", "threshold_ptr", *KEPT, *_common(spec))


def backward_names(spec: KernelSpec) -> tuple[str, ...]:
    """Of all three backward kernels; a pointer that is not needed is None."""
    rows = ("out_ptr", "logsumexp_ptr", "threshold_ptr", "delta_ptr", "scale_ptr")
    gradients = ("dq_ptr", "dk_ptr", "dv_ptr", *(f"dc{n}_ptr" for n in range(len(spec.captured))))
    return (*matrix_names("q", "k", "v", "grad_out"), *rows, *gradients, *_common(spec))


def unspecialised(spec: KernelSpec) -> tuple[str, ...]:
    """Numbers that may change from call to call and gain nothing from being 1 or a multiple of 16."""
    of_lists = [x for x in listing_names(spec) if not x.endswith("_ptr")]
    return (*(f"n{n}" for n in range(spec.sizes)), *_dropout_names(spec)[1:], *of_lists)
