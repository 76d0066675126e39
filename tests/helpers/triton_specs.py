"""A dozen specs that between them use every part of the Triton templates, and the command that writes their golden
sources: `make golden`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from places import GOLDEN, TESTS

from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec
from kvt_compile.kernels.tiles import conditioned
from kvt_compile.kernels.triton.generate import module_source

SOURCES = GOLDEN / "triton"
_float, _half, _bool = (CapturedSpec(x, 3) for x in ("float32", "bfloat16", "bool"))


def training(spec: KernelSpec) -> KernelSpec:
    """The backward of a spec, with every gradient there is."""
    return dataclasses.replace(spec, needs_grad=(True, True, True, *(c.is_float for c in spec.captured)))


VIT = KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s")
VIT32 = KernelSpec("float32", "float32", 64, 64, score="0.125*s")
SWIN = KernelSpec("bfloat16", "bfloat16", 32, 32, score="0.1767766952966369*s + c0[h, i, j] + c1[b % n0, i, j]",
                  captured=(_half, _float), sizes=1)  # fmt: skip
_tables = (CapturedSpec("float32", 1), CapturedSpec("float32", 2), CapturedSpec("int64", 2))
SWIN2 = KernelSpec("float32", "float32", 32, 32, score="s*c0[h] + c1[c2[i, j], h]", captured=_tables)
CAUSAL = KernelSpec("float16", "float16", 128, 128, score="where(le(j, i), 0.08838834764831845*s, -oo)")
SOFTCAP = KernelSpec("bfloat16", "bfloat16", 256, 256, score="50.0*tanh(0.00125*s)")
MASKED = KernelSpec(
    "float32", "float32", 80, 80, score="where(c0[b, i, j], 0.11180339887498948*s, -oo)", captured=(_bool,)
)
DROPOUT = KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s", dropout=True)
GATED = KernelSpec("float32", "float32", 48, 24, score="s*c0[h]", weight="p*c1[h, i]*(1.0 + p)",
                   captured=(CapturedSpec("float32", 1), CapturedSpec("float32", 2)))  # fmt: skip
WINDOW = KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s", select="window(13) | prefix")
REGIONS = KernelSpec("float32", "float32", 32, 32, score="0.1767766952966369*s", weight="p*(1.0 + p)",
                     select="regions(0.25, 8) | prefix")  # fmt: skip
CHOSEN = conditioned(KernelSpec("bfloat16", "bfloat16", 32, 32, score="0.1767766952966369*s",
                                select="heads(0.5) & keys(64) | window(13) | prefix"))  # fmt: skip
DOUBLE = KernelSpec("float64", "float64", 16, 16, score="0.25*s")

SPECS: dict[str, KernelSpec | SoftmaxSpec] = {
    "vit": VIT,
    "vit_backward": training(VIT),
    "vit_float32": VIT32,
    "swin": SWIN,
    "swin_backward": training(SWIN),
    "swin_v2_backward": training(SWIN2),
    "causal": CAUSAL,
    "causal_backward": training(CAUSAL),
    "softcap": SOFTCAP,
    "masked_float32": MASKED,
    "dropout_backward": training(DROPOUT),
    "gated": GATED,
    "gated_backward": training(GATED),
    "float64": DOUBLE,
    "window": WINDOW,
    "window_backward": training(WINDOW),
    "regions": REGIONS,
    "regions_backward": training(REGIONS),
    "chosen": CHOSEN,
    "chosen_backward": training(CHOSEN),
    "rows": SoftmaxSpec("bfloat16", "float32"),
}


def path_of(name: str) -> Path:
    """Not a .py file: it is data here."""
    return SOURCES / f"{name}.py.txt"


def main() -> None:
    """Write every golden source, and remove those of specs that are gone."""
    SOURCES.mkdir(parents=True, exist_ok=True)
    for stale in set(SOURCES.glob("*.py.txt")) - {path_of(name) for name in SPECS}:
        stale.unlink()
    for name, spec in SPECS.items():
        path_of(name).write_text(module_source(spec), encoding="utf-8")
        print(path_of(name).relative_to(TESTS))


if __name__ == "__main__":
    main()
