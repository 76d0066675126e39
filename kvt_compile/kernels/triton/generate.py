"""KernelSpec -> the Triton source of its kernels: of the forward, or, where it says what needs a gradient, of the
backward; SoftmaxSpec -> the row kernels.

    header  functions  load  program  [listed]  score  select  normalise  forward
    header  functions  load  program  [listed]  score  normalise  slopes  backward

The text depends on the spec alone: block sizes, the index type and the precision of products are compile-time arguments
of the kernels.  Templates are the parts in `templates/`; each function stands in one of them, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
import sympy

from kvt_compile.kernels import tiles
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.derivative import is_zero_at_zero
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton import bounds, layout
from kvt_compile.kernels.triton.scalar import NotGenerated, TilePrinter, unsure_functions
from kvt_compile.kernels.triton.slopes import slopes

HALVING_FROM = 6
"""Passes that only interpolate; 64 rows of normal scores are all done after 5.5 (N = 197) to 6.5 (4096),
docs/kernel.md."""
EXACT_LOGSUMEXP = 32.0
"""Beyond it exp(t - logsumexp) is divided by its sum once more: its relative error, half an ulp of logsumexp, is then
more than 2e-6."""
WIDTH = 118
LONGEST_SENTENCE = 130

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("kvt_compile.kernels.triton"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)


@lru_cache(maxsize=256)
def module_source(spec: KernelSpec | SoftmaxSpec, contracting: bool = False) -> str:
    """The Triton module of a spec.  contracting: for NVIDIA GPUs, where products and sums may be contracted (`traced`).

    Raises NotGenerated with the reason.
    """
    return _softmax(spec) if isinstance(spec, SoftmaxSpec) else _attention(spec, contracting)


def _attention(spec: KernelSpec, contracting: bool) -> str:
    if spec.select and (reason := tiles.refusal(spec.select)):
        raise NotGenerated(reason)
    tiles.check_conditioned(spec)
    if not is_zero_at_zero(spec.weight_of_numbers, language.p):
        raise NotGenerated("a weight that is not 0 where p is 0 is not generated for a GPU")
    if contracting and (unsure := unsure_functions(spec.score_expression)):
        raise NotGenerated(
            f"{', '.join(unsure)} of a score, whose library code may round otherwise from place to place,"
        )
    printer = TilePrinter(spec, contracting)
    tile = layout.tile_names(spec)
    backward = bool(spec.needs_grad)
    head_parts, value_parts = (layout.parts(x, layout.widest_part(spec)) for x in (spec.head_dim, spec.value_dim))
    wide = spec.dtype == "float64"
    listed = layout.listing(spec) is not None
    row_source = ["rows", *_names("q", head_parts), "k_ptr", "k_stride2", "k_stride3", "nk", "tile"]
    row_source += ["places"] if listed else []
    functions, scatters = slopes(spec, printer) if backward else ([], [])
    guarded = any(x.guarded for x in functions)
    g, v = _names("g", value_parts), _names("v", value_parts)
    places = ["rows.to(INDEX)[:, None]", "cols.to(INDEX)[None, :]"]
    partly = layout.listing(spec) == "tokens"
    constants = ("ROWS", "COLS", "INDEX", "PRECISION", *(("PARTLY",) if partly else ()))
    values: dict[str, Any] = {
        "spec": spec,
        "title": f"k-NN attention, {'backward' if backward else 'forward'}",
        "notation": _notation(spec),
        "real": "float64" if wide else "float32",
        "tile": ", ".join(tile),
        "names": lambda prefix, over: ", ".join(_names(prefix, over)),
        "head_parts": head_parts,
        "value_parts": value_parts,
        "matrices": (
            ("head", head_parts, spec.head_dim, ""),
            ("value", value_parts, spec.value_dim, "float64" if wide and spec.value_dtype != "float64" else ""),
        ),
        "stores": True,
        "unpack_tile": _unpacked(tile),
        "draw": ", ".join(layout.draw_names(spec)),
        "row_source_tuple": f"({', '.join(row_source)})",
        "reloads": layout.reloads(spec),
        **_constants(*constants),
        "score": printer.program(spec.score_expression),
        "weight": printer.program(spec.weight_expression) if spec.weight != "p" else None,
        "of_nan": "0.0" if spec.zero_for_nan else 'float("nan")',
        "curved": layout.curved(spec),
        "key_bounds": _bounds(bounds.key_bounds(spec.score_expression), "row", printer),
        "row_bounds": _bounds(bounds.row_bounds(spec.score_expression), "key", printer),
        "unspecialised": ", ".join(f'"{x}"' for x in (*(() if backward else layout.KEPT), *layout.unspecialised(spec))),
        "forward_params": ", ".join(_typed(layout.forward_names(spec))),
        "backward_params": ", ".join(_typed(layout.backward_names(spec))),
        "backward": backward,
        "slopes": functions,
        "scatters": scatters,
        "plain_delta": spec.weight == "p" and (not wide or spec.value_dtype == "float64"),
        "guarded": guarded,
        "gradient_args": ", ".join(
            [*(["dropped"] if guarded else []), "p", *g, *v, *places, "tile", "draw", "INDEX", "PRECISION"]
        ),
        "exact_logsumexp": EXACT_LOGSUMEXP,
    }
    if backward:
        through = {x.name: x for x in functions}
        values["through_score"] = through["through_score"].call("dt", "s")
        values["through_weight"] = "dw" if spec.weight == "p" else through["through_weight"].call("dw", "p")
        values |= dict(zip(("need_q", "need_k", "need_v"), spec.needs_grad, strict=False))
    values |= _selection(wide) | _listing(spec, listed, partly)
    values |= {"functions": printer.functions, "tanh_series": _tanh_series(14 if wide else 9)}
    values |= {"contracting": contracting}
    names = ["header", "functions", "load", "program", *(["listed"] if listed else []), "score"]
    names += ["normalise", "slopes", "backward"] if backward else ["select", "normalise", "forward"]
    return _render(names, values)


def _listing(spec: KernelSpec, listed: bool, partly: bool) -> dict[str, Any]:
    """Which tokens a program's rows and keys are: those that follow one another, or what lists name."""
    values: dict[str, Any] = {"listed": listed, "partly": partly, "row_count": "nq", "key_count": "nk"}
    values |= {"rows_at": "first_row + tl.arange(0, ROWS)", "keys_at": "first_key + tl.arange(0, COLS)"}
    values |= {"cols_at": "start + tl.arange(0, COLS)", "walked_at": "start + tl.arange(0, ROWS)"}
    if not listed:
        return values
    places = [x for x in layout.listing_names(spec) if x in layout.PLACES]
    values |= {"row_count": "tiles * ROWS", "key_count": "tiles * COLS"}
    for side, head, first, size in (
        ("rows", "heads + h", "first_row", "ROWS"),
        ("keys", "(heads // group) + key_head", "first_key", "COLS"),
    ):
        own = f" + (b.to(tl.int64) * {head}) * head_lanes" if spec.tables else ""
        values[f"{side}_at"] = f"tile_of(lane_ptr{own}, {first}, {size})"
    values |= {"cols_at": "listed(start, places, nk, COLS)", "walked_at": "listed(start, places, nq, ROWS)"}
    values |= {"place_names": ", ".join([*places, "last"]), "unpack_places": f"{', '.join([*places, 'last'])} = places"}
    return values | {"list_names": ", ".join(layout.LISTS)}


def _softmax(spec: SoftmaxSpec) -> str:
    wide = spec.dtype == "float64"
    values: dict[str, Any] = {
        "spec": spec,
        "title": f"softmax over the topk largest, {spec.dtype} -> {spec.out_dtype}",
        "notation": "    kept: scores among the topk largest of their row, ties included    w = softmax over the kept",
        "real": "float64" if wide else "float32",
        **_constants("ROWS", "COLS", "INDEX"),
        "weight": None,
        "gradient_type": "float64" if spec.out_dtype == "float64" else "float32",
    }
    return _render(["header", "softmax", "select", "kept", "softmax_kernels"], values | _selection(wide))


def _selection(wide: bool) -> dict[str, Any]:
    bits = 64 if wide else 32
    return {
        "bits": f"tl.int{bits}",
        "sign_bit": bits - 1,
        "low_bits": "0x7FFFFFFFFFFFFFFF" if wide else "0x7FFFFFFF",
        "huge": "1e8",
        "halving_from": HALVING_FROM,
        "most_passes": HALVING_FROM + 2 * bits + 10,
    }


def _render(names: Sequence[str], values: dict[str, Any]) -> str:
    text = "\n\n\n".join(_ENVIRONMENT.get_template(f"{name}.py.jinja").render(**values).strip("\n") for name in names)
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(line.rstrip() for line in text.splitlines()))
    return "\n".join(wrapped for line in text.splitlines() for wrapped in _wrap(line)) + "\n"


def _wrap(line: str) -> list[str]:
    """A long line is broken at its argument lists' commas, or before the right side of `&` and `|`: every generated
    line that is long is inside brackets.  A sentence of a template stays as it is written there."""
    if len(line) <= (LONGEST_SENTENCE if '"""' in line else WIDTH) or ", " not in line:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + (0 if line.rstrip().endswith(",") else 4))
    lines, current, depth = [], "", 0
    for word in re.split(r"(?<=, )|(?<= [&|] )", line):
        if current and depth > 0 and len(current) + len(word.rstrip()) > WIDTH:
            lines.append(current.rstrip())
            current = indent
        current += word
        depth += sum(word.count(x) for x in "([") - sum(word.count(x) for x in ")]")
        if line.rstrip().endswith(",") and depth == 0:
            depth = 1  # a line of a parameter list
    return [*lines, current]


def _constants(*names: str) -> dict[str, str]:
    return {"constants": ", ".join(names), "constant_params": ", ".join(f"{x}: tl.constexpr" for x in names)}


def _unpacked(tile: Sequence[str]) -> str:
    names = ", ".join(tile)
    return f"{names} = tile" if len(names) < WIDTH - 12 else f"({names}) = tile"


def _names(prefix: str, over: Sequence[object]) -> list[str]:
    return [f"{prefix}{n}" for n in range(len(over))]


def _typed(names: Sequence[str]) -> list[str]:
    # a number that is a Python float would travel as float32
    return [f"{x}: tl.float64" if x == "keep_scale" else f"{x}: tl.int64" if x == "drop_below" else x for x in names]


def _bounds(found: Sequence[bounds.Bound], other: str, printer: TilePrinter) -> list[tuple[str, str]]:
    names = {bounds.low: sympy.Symbol(f"first_{other}"), bounds.high: sympy.Symbol(f"last_{other}")}
    return [(side, printer(bound.xreplace(names)).text) for side, bound in found]


def _tanh_series(terms: int) -> list[str]:
    """Coefficients of x, x**3, ... highest first."""
    four = sympy.Integer(4)
    found = [four**n * (four**n - 1) * sympy.bernoulli(2 * n) / sympy.factorial(2 * n) for n in range(1, terms + 1)]
    return [repr(float(x)) for x in reversed(found)]


def _notation(spec: KernelSpec) -> str:
    d, dv = spec.head_dim, spec.value_dim
    those = " that are allowed" if layout.listing(spec) else ""
    lines = [
        f"q [B, Hq, Nq, D = {d}] {spec.dtype},  k [B, Hk, Nk, D],  v [B, Hk, Nk, Dv = {dv}] {spec.value_dtype}",
        f"s = q . k    t = {spec.score}",
        f"kept: t among the topk largest of its row{those}, ties included    p = softmax over the kept",
        f"w = {spec.weight}{', then dropout' if spec.dropout else ''}    out = sum over j of w v_j",
    ]
    if layout.listing(spec):
        lines.insert(2, f"allowed: {spec.select}")
    lines += [f"c{n}: {c.dtype}, {c.ndim} dimensions" for n, c in enumerate(spec.captured)]
    if spec.needs_grad:
        inputs = ("q", "k", "v", *(f"c{n}" for n in range(len(spec.captured))))
        wanted = [name for name, need in zip(inputs, spec.needs_grad, strict=True) if need]
        lines += [
            f"gradients: {', '.join(wanted) or 'none'}",
            "",
            "The kept keys are the forward's: t >= its threshold, which lies midway between the smallest kept and the",
            "largest dropped score, and t comes from the forward's own function score_tile.",
        ]
    return "\n".join(f"    {line}".rstrip() for line in lines)
