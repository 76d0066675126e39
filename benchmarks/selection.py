"""Attention under a selection against dense SDPA, and against FlexAttention with a block mask of its own: CPU time.

    python benchmarks/selection.py [--threads 1 2] [--turns 5] [--only window ...] [--flex] [--blocks 12] [--json PATH]

Every line is a ratio of medians measured in one run, the contestants taking turns.  Time is CPU time of the process
(all its threads), which other programs on the machine change little; targets stand beside the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _shared import step
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kvt_compile
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.tiles import tile_lists

HEADS, DIM = 4, 64
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line: a selection on a grid, with the targets of its forward and of forward and backward."""

    name: str
    select: str
    grid: tuple[int, ...]
    forward: float | None = None
    both: float | None = None
    causal: bool = False

    @property
    def tokens(self) -> int:
        total = 1
        for size in self.grid:
            total *= size
        return total


CASES = (
    Case("window", "window(13)", (64, 64), 0.15, 0.20),
    Case("window and topk", "window(13) & topk(64)", (64, 64), 0.25),
    Case("regions", "regions(1/8, 8)", (64, 64), 0.25, 0.30),
    Case("halo", "halo(8, 3)", (64, 64)),
    Case("sequence", "window(256, causal=True) | sinks(4)", (16384,), 0.06, causal=True),
    Case("topk alone", "topk(169)", (64, 64)),
)


@dataclass(frozen=True)
class Line:
    """Milliseconds of CPU time, and their ratio."""

    what: str
    against: str
    threads: int
    ours_ms: float
    theirs_ms: float
    target: float | None = None
    listed: float | None = None
    """Share of all scores that is computed."""

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.theirs_ms


def medians(turns: int, *runs: Run) -> list[float]:
    """Median milliseconds of CPU time of each, taking turns after one turn that is not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(turns + 1):
        for run, into in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            if turn:
                into.append(1000 * (time.process_time() - start))
    return [statistics.median(x) for x in times]


def inputs(tokens: int, grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, tokens, DIM, requires_grad=grad) for _ in range(3)]


def share(case: Case) -> float | None:
    """Of all scores, those that are computed with 32 queries a tile."""
    chosen = selection_of(case.select, case.grid, 0, case.tokens, case.tokens)
    if chosen is None or chosen.allowed is None:
        return None
    q, k, _ = inputs(case.tokens, False)
    return tile_lists(chosen, q, k, 32).listed / case.tokens**2


def measure(case: Case, threads: int, turns: int) -> list[Line]:
    lines = []
    listed = share(case)
    for grad in (False, True) if case.both is not None else (False,):
        q, k, v = leaves = inputs(case.tokens, grad)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return kvt_compile.attention(q, k, v, select=case.select, grid=case.grid, is_causal=case.causal)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        runs: list[Run] = [ours, dense]
        if grad:
            weight = torch.randn(1, HEADS, case.tokens, DIM)
            runs = [step(run, leaves, weight) for run in (ours, dense)]
        mine, other = medians(turns, *runs)
        what = f"{case.select} at {'x'.join(map(str, case.grid))}, {'forward and backward' if grad else 'forward'}"
        target = case.both if grad else case.forward
        lines.append(Line(what, "dense SDPA", threads, mine, other, target, listed))
    return lines


def flex(threads: int, turns: int) -> Line:
    """The window against FlexAttention with a block mask, both forward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = CASES[0]
    q, k, v = inputs(case.tokens, False)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = None
        for query, key, size in ((i // 64, j // 64, 64), (i % 64, j % 64, 64)):
            centre = query.clamp(6, size - 7)
            here = (key - centre).abs() <= 6
            kept = here if kept is None else kept & here
        assert kept is not None
        return kept

    mask = create_block_mask(near, None, None, case.tokens, case.tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        expected = kvt_compile.attention(q, k, v, select=case.select, grid=case.grid)
        torch.testing.assert_close(compiled(q, k, v, block_mask=mask), expected, atol=1e-5, rtol=1e-4)
        mine, other = medians(
            turns,
            lambda: kvt_compile.attention(q, k, v, select=case.select, grid=case.grid),
            lambda: compiled(q, k, v, block_mask=mask),
        )
    return Line(f"{case.select} at 64x64, forward", "FlexAttention, block mask", threads, mine, other, 0.25)


def growth(threads: int, turns: int) -> Line:
    """window(13) at 128 x 128 tokens against 16 times what it takes at 32 x 32: N^1.1 would be 1.32."""
    small, large = (inputs(n * n, False) for n in (32, 128))
    one, sixteen = medians(
        turns,
        lambda: kvt_compile.attention(*small, select="window(13)", grid=(32, 32)),
        lambda: kvt_compile.attention(*large, select="window(13)", grid=(128, 128)),
    )
    return Line("window(13), 16,384 tokens", "16 times 1,024 tokens", threads, sixteen, 16 * one, 16**0.1)


class Block(nn.Module):
    """A block of ViT-B: 12 heads of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(768), nn.Linear(768, 3 * 768), nn.Linear(768, 768)
        self.mlp = nn.Sequential(nn.LayerNorm(768), nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 12, 64).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, 768))
        return x + self.mlp(x)


class ViT(nn.Module):
    """ViT-B/16 with as many blocks as are asked for, and a class token."""

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 768, 16, 16), nn.Parameter(torch.randn(1, 1, 768))
        self.place = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 16) ** 2, 768))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def model(threads: int, turns: int, blocks: int) -> list[Line]:
    """A vision transformer at 1,024 x 1,024: 4,097 tokens, dense torch.compile against ours."""
    torch.manual_seed(0)
    vit, image = ViT(blocks, 1024), torch.randn(1, 3, 1024, 1024)
    dense = torch.compile(vit)
    ours = torch.compile(vit, backend="kvt", options={"select": "window(13) | prefix"})
    lines = []
    for training in (False, True):

        def one(run: Callable[[Tensor], Tensor], training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                out = run(image)
                if training:
                    torch.autograd.grad(out.sum(), list(vit.parameters()))

        mine, other = medians(turns, lambda: one(ours), lambda: one(dense))
        what = (
            f"ViT-B/16, {blocks} blocks, 1024x1024, window(13) | prefix, {'training step' if training else 'inference'}"
        )
        lines.append(Line(what, "dense torch.compile", threads, mine, other, 0.65))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES] + ["growth"])
    parser.add_argument("--flex", action="store_true", help="compile FlexAttention too (half a minute)")
    parser.add_argument(
        "--blocks", type=int, default=0, help="a vision transformer of so many blocks as well (12: whole)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines: list[Line] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case in CASES:
            if case.name in args.only:
                lines += measure(case, threads, args.turns)
        if "growth" in args.only:
            lines.append(growth(threads, args.turns))
        if args.blocks:
            lines += model(threads, args.turns, args.blocks)
        if args.flex:
            lines.append(flex(threads, args.turns))
    table = Table("what", "against", "threads", "ms", "theirs", "ratio", "target", "computed")
    for x in lines:
        target = "" if x.target is None else f"<= {x.target:.2f}{'' if x.ratio <= x.target else ' missed'}"
        computed = "" if x.listed is None else f"{100 * x.listed:.1f} %"
        row = (x.what, x.against, str(x.threads), f"{x.ours_ms:.1f}", f"{x.theirs_ms:.1f}", f"{x.ratio:.3f}")
        table.add_row(*row, target, computed)
    Console(width=160).print(table)
    if args.json:
        found = [asdict(x) | {"ratio": x.ratio} for x in lines]
        machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps({**machine, "lines": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
