"""How many counting passes the Triton kernels' selection takes, on rows of many kinds: a model of
`kernels/triton/templates/select.py.jinja` in torch, checked against a sort.

    python benchmarks/selection_passes.py

No GPU and no time is measured here: the number of passes depends on the scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

HALVING_FROM, MOST_PASSES = 6, 80
ROWS = 2048
INF = math.inf


def normal_quantile(part: Tensor) -> Tensor:
    u = torch.sqrt(-2.0 * torch.log(torch.minimum(part, 1.0 - part)))
    below = 1.0 + u * (1.432788 + u * (0.189269 + u * 0.001308))
    z = u - (2.515517 + u * (0.802853 + u * 0.010328)) / below
    return torch.where(part < 0.5, z, -z)


def ordinal(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_ordinal(x: Tensor) -> Tensor:
    return (x ^ ((x >> 31) & 0x7FFFFFFF)).view(torch.float32)


def middle(low: Tensor, high: Tensor) -> Tensor:
    a, b = ordinal(low), ordinal(high)
    return from_ordinal((a & b) + ((a ^ b) >> 1) + ((a ^ b) & 1))


def passes(t: Tensor, topk: int) -> Tensor:
    """t float32 `[rows, N]`, finite or -inf -> passes each row takes; names are the template's."""
    top = t.amax(1)
    off = t - top[:, None]
    usual = off > -1e8
    number = usual.sum(1).float()
    total, squares = torch.where(usual, off, 0.0).sum(1), torch.where(usual, off * off, 0.0).sum(1)
    deviation = ((squares - total * total / number).clamp(min=0.0) / number).sqrt()
    z = normal_quantile((topk / number).clamp(1e-4, 0.9999))
    pivot = torch.minimum(top + total / number + z * deviation, top)
    step = deviation / number * 2.5066 * torch.exp(0.5 * z * z)
    low_count = (t > -INF).sum(1).float()
    open_ = searched = low_count > topk
    low, high, over = torch.full_like(top, -INF), top.clone(), torch.zeros_like(top)
    under, high_count, side, taken = (torch.zeros_like(top) for _ in range(4))
    for number_of_pass in range(MOST_PASSES):
        if not open_.any():
            break
        taken += open_
        reaches = t >= pivot[:, None]
        count = reaches.sum(1).float()
        reach, miss = torch.where(reaches, t, INF).amin(1), torch.where(reaches, -INF, t).amax(1)
        excess = count - topk
        up, down = open_ & (excess >= 0), open_ & (excess < 0)
        under = torch.where(down, -excess, torch.where(up & (side > 0), 0.5 * under, under))
        over = torch.where(up, excess, torch.where(down & (side < 0), 0.5 * over, over))
        side = torch.where(up, 1.0, torch.where(down, -1.0, side))
        low, low_count = torch.where(up, reach, low), torch.where(up, count, low_count)
        high, high_count = torch.where(down, miss, high), torch.where(down, count, high_count)
        open_ = open_ & ((low == -INF) | ((low < high) & (low_count > topk)))
        newton = pivot + excess * step * 1.2
        step = step * 1.5
        guess = torch.where((low > -INF) & (under > 0), low + (high - low) * (over / (over + under)), newton)
        interpolate = number_of_pass < HALVING_FROM or number_of_pass % 2 == 1
        guess = torch.where((guess > low) & (guess <= high) & interpolate, guess, middle(low, high))
        guess = torch.where((low > -INF) & (low_count - topk <= 1), from_ordinal(ordinal(low + 0.0) + 1), guess)
        guess = torch.where((topk - high_count <= 1) | (low >= high), high, guess)
        pivot = torch.where(open_, guess, pivot)
    exact = t.sort(1, descending=True).values[:, topk - 1]
    if open_.any() or not torch.equal(low[searched], exact[searched]):
        raise AssertionError("the selection did not find the k-th largest score")
    return taken


def slowest(taken: Tensor, rows: int) -> float:
    """Of a tile of rows: what a program pays."""
    return float(taken.view(-1, rows).amax(1).mean())


def normal(n: int) -> Tensor:
    return torch.randn(ROWS, n)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": normal,
    "normal, rounded to bfloat16": lambda n: normal(n).bfloat16().float(),
    "two normals, 6 apart": lambda n: normal(n) + 6.0 * torch.randint(0, 2, (ROWS, n)),
    "log-normal": lambda n: normal(n).exp(),
    "two values": lambda n: torch.randint(0, 2, (ROWS, n)).float(),
    "integers -3 to 3": lambda n: torch.randint(-3, 4, (ROWS, n)).float(),
    "causal": lambda n: torch.where(torch.rand(ROWS, n) < torch.rand(ROWS, 1), normal(n), -INF),
    "40 % masked by -1e9": lambda n: torch.where(torch.rand(ROWS, n) < 0.6, normal(n), -1e9),
    "one outlier of 1e30": lambda n: torch.cat((normal(n - 1), torch.full((ROWS, 1), 1e30)), 1),
    "powers of two, 2^-140 to 2^99": lambda n: 2.0 ** torch.randint(-140, 100, (ROWS, n)).float(),
}


def main() -> None:
    """Print the table of docs/kernel.md."""
    torch.manual_seed(0)
    print(f"| scores ({ROWS} rows) | N | k | mean of a row | slowest of 32 rows | slowest of 64 rows | worst |")
    print("|---|---|---|---|---|---|---|")
    for kind, rows in KINDS.items():
        for n, topk in ((197, 100), (1024, 512), (1024, 128), (4096, 2048), (4096, 512)):
            if n == 4096 and not kind.startswith(("normal", "two normals")):
                continue
            taken = passes(rows(n), topk)
            tiles = f"{slowest(taken, 32):.1f} | {slowest(taken, 64):.1f}"
            print(f"| {kind} | {n} | {topk} | {float(taken.mean()):.1f} | {tiles} | {int(taken.max())} |", flush=True)


if __name__ == "__main__":
    main()
