"""KVT's own model before and after: a training step and what it keeps for the backward, on a CPU.

    python benchmarks/own_selection.py [--turns 5] [--json PATH]

DeiT-Tiny's shape with 100 keys a query, float32, one thread.  Before: the model as it is, in eager code.  After: what
`kvt_compile.rewrite` makes of it, in eager code too, so that nothing but the attention differs.  Time is CPU time of
the process, which other programs on the machine change little; the two take turns.  That they are the same is checked
in float64: in float32 two keys may change places at the threshold, where rounding decides.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from official_kvt import KVT, KNNAttention, kept_for_backward

import kvt_compile


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def medians(turns: int, models: tuple[nn.Module, nn.Module], x: Tensor) -> list[float]:
    """Milliseconds of CPU time of a training step of each, after one turn that is not counted."""
    times: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for model, into in zip(models, times, strict=True):
            start = time.process_time()
            step(model, x)
            if turn:
                into.append(1000 * (time.process_time() - start))
    return [statistics.median(x) for x in times]


def line(what: str, model: nn.Module, x: Tensor, turns: int) -> dict[str, object]:
    exact = copy.deepcopy(model).double()
    one = x[:1].double()
    torch.testing.assert_close(kvt_compile.rewrite(exact, one).module(one), exact(one), rtol=1e-9, atol=1e-9)
    after = kvt_compile.rewrite(model, x).module
    before_ms, after_ms = medians(turns, (model, after), x)
    kept = [kept_for_backward(net, x) / 2**20 for net in (model, after)]
    print(
        f"{what}: {before_ms:.0f} -> {after_ms:.0f} ms ({before_ms / after_ms:.2f} times as fast), "
        f"kept for the backward {kept[0]:.0f} -> {kept[1]:.0f} MiB"
    )
    return {
        "what": what, "before_ms": before_ms, "after_ms": after_ms, "before_mib": kept[0], "after_mib": kept[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for size in (224, 448):
        tokens = (size // 16) ** 2 + 1
        attention, x = KNNAttention(192, 3, topk=100), torch.randn(4, tokens, 192)
        lines.append(line(f"one attention, {tokens} tokens, batch 4", attention, x, args.turns))
        images = torch.randn(4, 3, size, size)
        lines.append(line(f"the model at {size}, {tokens} tokens, batch 4", KVT(size), images, args.turns))
    if args.json:
        machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
        args.json.write_text(json.dumps({**machine, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
