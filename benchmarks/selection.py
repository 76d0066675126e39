"""Attention under a selection against dense SDPA, and against FlexAttention with a block mask of its own, on a CPU.

    python benchmarks/selection.py [--threads 1 2] [--turns 5] [--only window ...] [--without model ...]
                                   [--older ../older] [--json PATH]

Every line is a ratio of medians measured in one run, the contestants taking turns; targets stand beside the results.
With one thread time is processor time of that thread, which other programs on the machine change little; with more it
is the wall clock's, and the ratio of processor times of the whole process stands beside it.

Parts: those of CASES, `growth`, `flex` (half a minute of compiling), `model` (a ViT-B/16 at 1,024 x 1,024: a quarter of
an hour), `older` (exact top-k beside another checkout's, where one is given).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from _older import Checkout
from _shared import step
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kvt_compile
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.tiles import tile_lists
from kvt_compile.select.maps import Places, allowed

HEADS, DIM = 4, 64
TOPK_TURNS = 15
"""So that two processes of the same code differ by less than 2 %."""
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


FLEX = ("window", "halo")
"""Cases that are compared with FlexAttention too."""
CASES = (
    Case("window", "window(13)", (64, 64), 0.15, 0.20),
    Case("window and topk", "window(13) & topk(64)", (64, 64), 0.25),
    Case("regions", "regions(1/8, 8)", (64, 64), 0.25, 0.30),
    Case("halo", "halo(8, 3)", (64, 64)),
    Case("sequence", "window(256, causal=True) | sinks(4)", (16384,), 0.06, causal=True),
    Case("keys", "keys(64)", (64, 64)),
    Case("heads", "heads(2)", (64, 64)),
    Case("keys or window", "keys(64) | window(13)", (64, 64)),
    Case("regions or window", "regions(1/16, 8) | window(13)", (64, 64)),
    Case("topk alone", "topk(169)", (64, 64)),
)


@dataclass(frozen=True)
class Line:
    """Milliseconds, and their ratio."""

    what: str
    against: str
    threads: int
    ours_ms: float
    theirs_ms: float
    target: float | None = None
    listed: float | None = None
    """Share of all scores that is computed."""
    processor: float | None = None
    """The ratio of processor times, where milliseconds are those of the wall clock."""

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.theirs_ms


Times = tuple[float, float, float | None]
"""Milliseconds of two contestants, and the ratio of their processor times where those are the wall clock's."""


def race(turns: int, ours: Run, theirs: Run) -> Times:
    """Medians of both, taking turns after one turn that is not counted."""
    single = torch.get_num_threads() == 1
    clocks = (time.thread_time,) if single else (time.perf_counter, time.process_time)
    times: list[list[list[float]]] = [[[] for _ in clocks] for _ in range(2)]
    for turn in range(turns + 1):
        for run, into in zip((ours, theirs), times, strict=True):
            started = [clock() for clock in clocks]
            run()
            for clock, start, kept in zip(clocks, started, into, strict=True):
                if turn:
                    kept.append(1000 * (clock() - start))
    first, *more = ((statistics.median(times[0][n]), statistics.median(times[1][n])) for n in range(len(clocks)))
    return (*first, more[0][0] / more[0][1] if more else None)


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
        mine, other, processor = race(turns, *runs)
        what = f"{case.select} at {'x'.join(map(str, case.grid))}, {'forward and backward' if grad else 'forward'}"
        target = case.both if grad else case.forward
        lines.append(Line(what, "dense SDPA", threads, mine, other, target, listed, processor))
    return lines


def flex(case: Case, threads: int, turns: int) -> Line:
    """A selection of places against FlexAttention with a block mask made from the same map, both forward: on a CPU
    FlexAttention has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    chosen = selection_of(case.select, case.grid, 0, case.tokens, case.tokens)
    assert chosen is not None
    selector, geometry = chosen.allowed, chosen.geometry
    assert selector is not None
    q, k, v = inputs(case.tokens, False)

    def may(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed(selector, Places(geometry, HEADS, b, h, i, j))

    mask = create_block_mask(may, None, None, case.tokens, case.tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    with torch.no_grad():
        expected = kvt_compile.attention(q, k, v, select=case.select, grid=case.grid)
        torch.testing.assert_close(compiled(q, k, v, block_mask=mask), expected, atol=1e-5, rtol=1e-4)
        mine, other, processor = race(
            turns,
            lambda: kvt_compile.attention(q, k, v, select=case.select, grid=case.grid),
            lambda: compiled(q, k, v, block_mask=mask),
        )
    what = f"{case.select} at {'x'.join(map(str, case.grid))}, forward"
    return Line(what, "FlexAttention, block mask", threads, mine, other, 0.25, processor=processor)


def growth(threads: int, turns: int) -> Line:
    """window(13) at 128 x 128 tokens against 16 times what it takes at 32 x 32: N^1.1 would be 1.32."""
    small, large = (inputs(n * n, False) for n in (32, 128))
    sixteen, one, processor = race(
        turns,
        lambda: kvt_compile.attention(*large, select="window(13)", grid=(128, 128)),
        lambda: kvt_compile.attention(*small, select="window(13)", grid=(32, 32)),
    )
    processor = None if processor is None else processor / 16
    what, against = "window(13), 16,384 tokens", "16 times 1,024 tokens"
    return Line(what, against, threads, sixteen, 16 * one, 16**0.1, processor=processor)


def older(folder: Path, threads: int, turns: int) -> Line:
    """Exact top-k, which has no selector, beside that of another checkout: processor time."""
    here = Path(__file__).resolve()
    before, after = (Checkout(x, str(here.parent / "_older.py"), threads) for x in (folder.resolve(), here.parents[1]))
    pairs = [[x.time(HEADS, 4096, DIM, 169) for x in (after, before)] for _ in range(max(turns, TOPK_TURNS) + 1)][1:]
    mine, other = (statistics.median(x) for x in zip(*pairs, strict=True))
    return Line("topk(169) of 4,096 keys, forward", "the older checkout", threads, mine, other, 1.02)


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
    shape = [1, 12, 4097, 64]
    for training in (False, True):
        leaves = [torch.randn(shape, requires_grad=training) for _ in range(3)]
        weight = torch.randn(shape)

        def attention(leaves: list[Tensor] = leaves) -> Tensor:
            return F.scaled_dot_product_attention(*leaves)

        def one(run: Callable[[Tensor], Tensor], training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                out = run(image)
                if training:
                    torch.autograd.grad(out.sum(), list(vit.parameters()))

        mine, other, processor = race(turns, lambda: one(ours), lambda: one(dense))
        step_of = "training step" if training else "inference"
        what = f"ViT-B/16, {blocks} blocks, 1024x1024, window(13) | prefix, {step_of}"
        lines.append(Line(what, "dense torch.compile", threads, mine, other, 0.65, processor=processor))
        alone, _, _ = race(turns, step(attention, leaves, weight) if training else attention, lambda: None)
        lines.append(
            Line(f"its {blocks} dense attentions alone, {step_of}", "the same", threads, blocks * alone, other)
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parts = [*(case.name for case in CASES), "growth", "flex", "model", "older"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--without", nargs="+", default=[], choices=parts, help="parts to leave out")
    parser.add_argument("--blocks", type=int, default=12, help="of the vision transformer (12: whole)")
    parser.add_argument("--older", type=Path, help="a checkout of an older commit, for exact top-k before and now")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = set(args.only) - set(args.without)
    lines: list[Line] = []

    def note(*found: Line) -> None:
        lines.extend(found)
        for line in found:
            print(f"{line.what} / {line.against}, {line.threads} threads: {line.ratio:.3f}", flush=True)
        if args.json:  # a run that is cut short keeps what it has
            args.json.write_text(json.dumps({**machine(), "lines": [as_row(x) for x in lines]}, indent=1) + "\n")

    for threads in args.threads:
        torch.set_num_threads(threads)
        for case in CASES:
            if case.name in asked:
                note(*measure(case, threads, args.turns))
            if "flex" in asked and case.name in FLEX:
                note(flex(case, threads, args.turns))
        if "growth" in asked:
            note(growth(threads, args.turns))
        if "older" in asked and args.older is not None:
            note(older(args.older, threads, args.turns))
        if "model" in asked:
            note(*model(threads, min(args.turns, 3), args.blocks))
    show(lines)


def as_row(line: Line) -> dict[str, object]:
    return {
        name: round(x, 4) if isinstance(x, float) else x for name, x in (asdict(line) | {"ratio": line.ratio}).items()
    }


def machine() -> dict[str, object]:
    """What was measured on."""
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "date": date.today().isoformat(), "torch": torch.__version__,
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def show(lines: list[Line]) -> None:
    table = Table("what", "against", "threads", "ms", "theirs", "ratio", "of processor time", "target", "computed")
    for x in lines:
        target = "" if x.target is None else f"<= {x.target:.2f}{'' if x.ratio <= x.target else ' missed'}"
        computed = "" if x.listed is None else f"{100 * x.listed:.1f} %"
        processor = "" if x.processor is None else f"{x.processor:.3f}"
        row = (x.what, x.against, str(x.threads), f"{x.ours_ms:.1f}", f"{x.theirs_ms:.1f}", f"{x.ratio:.3f}")
        table.add_row(*row, processor, target, computed)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
