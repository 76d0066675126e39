"""Every default configuration of the Triton kernels, what it uses on every target, and the command that writes that
down: `make resources` (about ten minutes).

A configuration is a spec, a kernel of it and a size that gets another default than the sizes before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton_specs import CAUSAL, DOUBLE, DROPOUT, GATED, MASKED, SOFTCAP, SWIN, VIT, VIT32, training

from kvt_compile.kernels.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import default
from kvt_compile.kernels.triton.compile import Resources, resources
from kvt_compile.kernels.triton.targets import TARGETS, parts_of

BUDGET = Path(__file__).parent / "golden" / "triton_resources.json"
SPECS: dict[str, KernelSpec | SoftmaxSpec] = {
    "vit": VIT,
    "vit float32": VIT32,
    "swin": SWIN,
    "causal 128": CAUSAL,
    "softcap 256": SOFTCAP,
    "masked float32 80": MASKED,
    "dropout": DROPOUT,
    "gated float32": GATED,
    "float64": DOUBLE,
    "wide float32": KernelSpec("float32", "float32", 256, 256, score="0.0625*s"),
    "rows": SoftmaxSpec("float32", "float32"),
}
SIZES = ((197, 197), (1024, 1024))
FEW_QUERIES = (1, 4096)
"""Takes the smaller tiles of 16-bit kernels; in the budget for "vit" and "causal 128"."""


@dataclass(frozen=True)
class Configuration:
    """One kernel with its default block sizes, for one target."""

    name: str
    spec: KernelSpec | SoftmaxSpec
    part: str
    blocks: Blocks
    target: str

    def __str__(self) -> str:
        x = self.blocks
        return (
            f"{self.name}, {self.part}, {x.kind} {x.rows}x{x.cols}, {x.warps} warps, {x.stages} stages, {self.target}"
        )

    def resources(self) -> Resources:
        return resources(self.spec, self.part, self.blocks, self.target)


def configurations() -> list[Configuration]:
    """All of them."""
    found = []
    for name, spec in SPECS.items():
        sizes = (*SIZES, FEW_QUERIES) if name in ("vit", "causal 128") else SIZES
        for version in (spec, training(spec)) if isinstance(spec, KernelSpec) else (spec,):
            for part in parts_of(version):
                for blocks in dict.fromkeys(default(version, part, *size) for size in sizes):
                    found += [Configuration(name, version, part, blocks, target) for target in TARGETS]
    return found


def budget() -> dict[str, Any]:
    """What was written down."""
    found: dict[str, Any] = json.loads(BUDGET.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Compile everything and write the budget."""
    kernels = {}
    for configuration in configurations():
        kernels[str(configuration)] = configuration.resources().to_dict()
        print(configuration, kernels[str(configuration)], flush=True)
    lines = [f"    {json.dumps(name)}: {json.dumps(x)}" for name, x in kernels.items()]
    text = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    BUDGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
