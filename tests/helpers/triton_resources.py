"""Every default configuration of the Triton kernels, what it uses on every target, and the command that writes that
down: `make resources` (a quarter of an hour); with --new only what is not written down yet.

A configuration is a spec, a kernel of it and a size that gets another default than the sizes before.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

import triton
from places import GOLDEN
from triton_specs import training

from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec
from kvt_compile.kernels.tiles import conditioned
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import default
from kvt_compile.kernels.triton.compile import Resources, resources
from kvt_compile.kernels.triton.layout import online
from kvt_compile.kernels.triton.targets import TARGETS, WARPGROUPS, parts_of

BUDGET = GOLDEN / "triton_resources.json"
SPILLS = {
    "3.8": {
        "bfloat16 128, forward, streaming 64x32, 8 warps, 2 stages, gfx942": 6,
        "bfloat16 128, backward_q, streaming 64x32, 8 warps, 1 stages, gfx942": 8,
        "bfloat16 128, backward_kv, streaming 64x32, 8 warps, 1 stages, gfx942": 10,
    }
}
"""Triton release -> the registers that a default spills there: defaults are chosen so that the Triton of the budget
spills none, and other releases allocate otherwise."""


def learned_bias(dtype: str, features: int) -> KernelSpec:
    """The common expression that asks most of a kernel: a tile of captured elements, with a gradient."""
    bias = CapturedSpec(dtype, 3)
    return KernelSpec(dtype, dtype, features, features, score="0.125*s + c0[h, i, j]", captured=(bias,))


SPECS: dict[str, KernelSpec | SoftmaxSpec] = {
    "bfloat16 64": learned_bias("bfloat16", 64),
    "bfloat16 128": learned_bias("bfloat16", 128),
    "bfloat16 256": learned_bias("bfloat16", 256),
    "float32 64": learned_bias("float32", 64),
    "float32 128": learned_bias("float32", 128),
    "float64 64": learned_bias("float64", 64),
    # what else a kernel may hold in registers: random words, the weights beside the scores, a second tile of elements
    "bfloat16 64, dropout": KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s", dropout=True),
    "bfloat16 64, gated": KernelSpec(
        "bfloat16", "bfloat16", 64, 64, score="0.125*s", weight="p*c0[h, i]*(1.0 + p)",
        captured=(CapturedSpec("float32", 2),),
    ),
    "bfloat16 32, window": KernelSpec(
        "bfloat16", "bfloat16", 32, 32, score="0.1767766952966369*s + c0[h, i, j] + c1[b % n0, i, j]",
        captured=(CapturedSpec("bfloat16", 3), CapturedSpec("float32", 3)), sizes=1,
    ),
    "rows": SoftmaxSpec("float32", "float32"),
    "bfloat16 64, lists": KernelSpec("bfloat16", "bfloat16", 64, 64, score="0.125*s", select="window(13) | prefix"),
    "bfloat16 64, bias and lists": dataclasses.replace(learned_bias("bfloat16", 64), select="window(13) | prefix"),
    "bfloat16 64, chosen": conditioned(KernelSpec(
        "bfloat16", "bfloat16", 64, 64, score="0.125*s", select="heads(0.5) & keys(64) | window(13) | prefix"
    )),
    "float32 64, lists": KernelSpec("float32", "float32", 64, 64, score="0.125*s", select="window(13) | prefix"),
}  # fmt: skip
SIZES = ((197, 197), (1024, 1024), (1, 4096))
"""Nq, Nk: resident, streaming, and the smaller tiles that few queries take."""


@dataclass(frozen=True)
class Configuration:
    """One kernel with its default block sizes, for one target."""

    name: str
    spec: KernelSpec | SoftmaxSpec
    part: str
    blocks: Blocks
    target: str
    ranked: bool = True
    """Of a selection, whether rows may keep fewer keys than it allows."""

    def __str__(self) -> str:
        x, part = self.blocks, self.part if self.ranked else f"{self.part} unranked"
        return f"{self.name}, {part}, {x.kind} {x.rows}x{x.cols}, {x.warps} warps, {x.stages} stages, {self.target}"

    def resources(self) -> Resources:
        return resources(self.spec, self.part, self.blocks, self.target, self.ranked)


def configurations() -> list[Configuration]:
    """All of them."""
    found = []
    for name, spec in SPECS.items():
        for version in (spec, training(spec)) if isinstance(spec, KernelSpec) else (spec,):
            for part in parts_of(version):
                for target in TARGETS:
                    kind = target.startswith("gfx"), target in WARPGROUPS
                    for blocks in dict.fromkeys(default(version, part, *size, *kind) for size in SIZES):
                        unranked = part == "forward" and isinstance(version, KernelSpec) and online(version)
                        for ranked in (True, False) if unranked else (True,):
                            found.append(Configuration(name, version, part, blocks, target, ranked))
    return found


def budget() -> dict[str, Any]:
    """What was written down."""
    found: dict[str, Any] = json.loads(BUDGET.read_text(encoding="utf-8"))
    return found


def main(known: dict[str, Any]) -> None:
    """Compile everything that is not known and write the budget."""
    kernels = {}
    for configuration in configurations():
        name = str(configuration)
        kernels[name] = known.get(name) or configuration.resources().to_dict()
        if name not in known:
            print(configuration, kernels[name], flush=True)
    lines = [f"    {json.dumps(name)}: {json.dumps(x)}" for name, x in kernels.items()]
    text = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    BUDGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    recorded = budget()
    same = "--new" in sys.argv and recorded["triton"] == triton.__version__
    main(recorded["kernels"] if same else {})
