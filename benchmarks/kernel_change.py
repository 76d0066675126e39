"""Kernels of an older checkout beside this one's: what a change of the score programs cost.

    git worktree add --detach ../older COMMIT
    python benchmarks/kernel_change.py ../older [--json PATH]

Each checkout captures, rewrites and runs the same models in a process of its own, with its own score texts and its own
generated C.  The two take turns, call by call, and are timed by the processor time of their one thread, so that a busy
machine slows both; a line is the median of one over the median of the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from _older import Checkout
from torch import Tensor, nn

HEADS, DIM, ROUNDS = 4, 64, 25
SIZES = (197, 577)
Score = Callable[[Tensor, Tensor, Tensor], Tensor]
SCORES: dict[str, Score] = {
    "scale": lambda s, bias, mask: s * DIM**-0.5,
    "bias": lambda s, bias, mask: s * DIM**-0.5 + bias,
    "mask": lambda s, bias, mask: (s * DIM**-0.5).masked_fill(mask, -torch.inf),
    "soft-cap": lambda s, bias, mask: 30.0 * torch.tanh(s * (DIM**-0.5 / 30.0)),
}


class Attention(nn.Module):
    """q, k, v `[1, HEADS, N, DIM]`; the bias `[HEADS, N, N]` is learned, the mask `[N, N]` is not."""

    def __init__(self, score: Score, tokens: int) -> None:
        super().__init__()
        self.score = score
        self.bias = nn.Parameter(torch.randn(HEADS, tokens, tokens))
        self.register_buffer("mask", torch.rand(tokens, tokens) < 0.2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.score(q @ k.transpose(-2, -1), self.bias, self.mask).softmax(-1) @ v


def serve() -> None:
    """A line of JSON [score, tokens, backward] in, a line with milliseconds of this thread out."""
    import kvt_compile

    torch.set_num_threads(1)
    calls: dict[tuple[str, int, bool], Callable[[], None]] = {}

    def call_of(score: str, tokens: int, backward: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        tensors = [torch.randn(1, HEADS, tokens, DIM, requires_grad=backward) for _ in range(3)]
        model = Attention(SCORES[score], tokens)
        module = kvt_compile.rewrite(model, *tensors, topk=0.5, lowering="c").module

        def call() -> None:
            with torch.set_grad_enabled(backward):
                out = module(*tensors)
            if backward:
                out.backward(torch.ones_like(out))

        call()
        return call

    print(kvt_compile.__file__, flush=True)
    for line in sys.stdin:
        case = tuple(json.loads(line))
        if case not in calls:
            calls[case] = call_of(*case)
        started = time.thread_time()
        calls[case]()
        print(1000 * (time.thread_time() - started), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("older", type=Path, nargs="?", help="a checkout of an older commit")
    parser.add_argument("--json", type=Path, help="where the lines are kept")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    if arguments.older is None:
        parser.exit(0, "nothing to compare with: give a checkout of an older commit\n")
    folders = arguments.older.resolve(), Path(__file__).parents[1].resolve()
    older, newer = (Checkout(folder, __file__) for folder in folders)
    lines = []
    for tokens in SIZES:
        for score in SCORES:
            for backward in (False, True):
                pairs = [
                    (older.time(score, tokens, backward), newer.time(score, tokens, backward)) for _ in range(ROUNDS)
                ]
                before, after = (statistics.median(x) for x in zip(*pairs[2:], strict=True))
                what = "forward and backward" if backward else "forward"
                print(f"{score:9} N = {tokens:4}  {what:20}  {before:7.2f} ms -> {after:7.2f} ms  {after / before:.2f}")
                lines.append({"score": score, "tokens": tokens, "what": what, "before": before, "after": after})
    if arguments.json:
        commits = [
            subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=x, text=True, capture_output=True
            ).stdout.strip()
            for x in folders
        ]
        record = {
            "date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine(),
            "before": commits[0], "after": commits[1], "milliseconds of one thread": lines,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
