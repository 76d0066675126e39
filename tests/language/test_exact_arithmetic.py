"""Arithmetic of captured tensors alone, in every lowering: bit for bit what torch computes.

One key: its logsumexp is the score.  All expressions stand in one program, batch item n computes the n-th.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import pytest
import torch
from interpreted import NAME, triton_on_cpu
from torch import Tensor

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops

ROWS = 64
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float64, torch.float32)


def elements(dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        size = 10.0 ** torch.randint(-3, 9, (ROWS,), generator=generator)
        x = torch.randn(ROWS, generator=generator, dtype=torch.float64) * size
        x[:4] = torch.tensor([0.0, -0.0, 1.0, torch.inf])
        return x.to(dtype)
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max, (ROWS,), generator=generator, dtype=dtype)
    x[:4] = torch.tensor([0, 1, info.min, info.max], dtype=dtype)
    x[4:20] = x[4:20] % 7
    return x


CAPTURED = [elements(dtype, n) for n, dtype in enumerate(dtype for dtype in DTYPES for _ in "xy")]
PAIRS = {dtype: (2 * n, 2 * n + 1) for n, dtype in enumerate(DTYPES)}
Function = Callable[[Tensor, Tensor], Tensor]

OF_ALL: dict[str, Function] = {
    "x + y": lambda x, y: x + y,
    "x - y": lambda x, y: x - y,
    "x*y": lambda x, y: x * y,
    "-x": lambda x, y: -x,
    "abs(x - y)": lambda x, y: (x - y).abs(),
    "x*y - y": lambda x, y: x * y - y,
    "x - y*y": lambda x, y: x - y * y,
    "-(x*y) + x*x": lambda x, y: -(x * y) + x * x,
    "x**2": lambda x, y: x**2,
    "x**3 - y": lambda x, y: x**3 - y,
    "x - 3 + y": lambda x, y: x - 3 + y,
    "0.1*x": lambda x, y: x * 0.1,
    "0.1*(x - y)/60.0": lambda x, y: (x - y) * 0.1 / 60,
    "maximum(x, y)": torch.maximum,
    "minimum(x, y) - x": lambda x, y: torch.minimum(x, y) - x,
    "relu(x)": lambda x, y: x.relu(),
    "clamp(x, y, y + y)": lambda x, y: torch.clamp(x, y, y + y),
    "where(lt(x, y), x - y, y - x)": lambda x, y: torch.where(x < y, x - y, y - x),
    "where(eq(x - y, y), -1.5, 0.25)": lambda x, y: torch.where(x - y == y, -1.5, 0.25),
    "where(logical_and(ge(x, 1), logical_not(ne(y, x))), x, y)": lambda x, y: torch.where((x >= 1) & ~(y != x), x, y),
}
MIXED: dict[str, Function] = {
    "x/y": lambda x, y: x / y,
    "(x - y)/10.0": lambda x, y: (x - y) / 10,
    "float64(x)*y - x": lambda x, y: x.double() * y - x,
    "float32(x - y)*y": lambda x, y: (x - y).float() * y,
}
ACROSS: dict[str, Callable[..., Tensor]] = {
    "c0[i] - c8[i]": lambda c: c[0] - c[8],
    "c2[i]*c6[i]": lambda c: c[2] * c[6],
    "c0[i] - c12[i]": lambda c: c[0] - c[12],
    "c10[i]*c12[i] + c2[i]": lambda c: c[10] * c[12] + c[2],
    "where(lt(c0[i], c12[i]), c10[i], c12[i])": lambda c: torch.where(c[0] < c[12], c[10], c[12]),
    "int32(c0[i])*c2[i]": lambda c: c[0].int() * c[2],
    "uint8(c4[i]) - c8[i]": lambda c: c[4].to(torch.uint8) - c[8],
    "int8(c0[i] + c2[i])": lambda c: (c[0] + c[2]).to(torch.int8),
    "int64(c8[i])*c0[i]": lambda c: c[8].long() * c[0],
    "int16(c0[i]) - int16(c2[i])": lambda c: c[0].to(torch.int16) - c[2].to(torch.int16),
    "c9[i] + i": lambda c: c[9].long() + torch.arange(ROWS),
}


def _all() -> dict[str, Callable[[list[Tensor]], Tensor]]:
    found: dict[str, Callable[[list[Tensor]], Tensor]] = dict(ACROSS)
    for dtype, (x, y) in PAIRS.items():
        texts = OF_ALL | (MIXED if dtype.is_floating_point else {})
        for text, function in texts.items():
            named = "".join({"x": f"c{x}[i]", "y": f"c{y}[i]"}.get(part, part) for part in _parts(text))
            found[named] = lambda c, function=function, x=x, y=y: function(c[x], c[y])
    return found


def _parts(text: str) -> list[str]:
    """x and y where they are names of their own."""
    import re

    return re.split(r"\b([xy])\b", text)


PROGRAMS = _all()
LOT = 24
"""Expressions of one program: its text has limits."""
LOTS = [list(PROGRAMS)[n : n + LOT] for n in range(0, len(PROGRAMS), LOT)]


def scores(texts: list[str], lowering: str, dtype: torch.dtype) -> Tensor:
    program = reduce(lambda rest, n: f"where(eq(b, {n}), float32({texts[n]}), {rest})", range(len(texts)), "0.0")
    q = torch.zeros(len(texts), 1, ROWS, 2, dtype=dtype)
    k = torch.zeros(len(texts), 1, 1, 2, dtype=dtype)
    logsumexp = torch.ops.kvt.attention(q, k, k, CAPTURED, program, "p", 1, [], 0.0, None, lowering)[1]
    return logsumexp[:, 0]


def check(lot: list[str], lowering: str, dtype: torch.dtype) -> None:
    if dtype is torch.float64 or lowering == "reference":  # a number makes whole numbers of the accumulation type
        lot = [text for text in lot if "0.1*" not in text]
    for text, found in zip(lot, scores(lot, lowering, dtype), strict=True):
        expected = PROGRAMS[text](CAPTURED).float().to(dtype)
        plain = expected.isfinite()  # a softmax takes NaN, +inf and a row of -inf for what they are
        assert torch.equal(found[plain], expected[plain]), text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowering", ["aten", "reference"])
@pytest.mark.parametrize("lot", range(len(LOTS)))
def test_torch_operations(lot: int, lowering: str, dtype: torch.dtype) -> None:
    check(LOTS[lot], lowering, dtype)


@pytest.mark.parametrize("lot", range(len(LOTS)))
def test_c(lot: int) -> None:
    check(LOTS[lot], "c", torch.float32)


def test_c_in_float64() -> None:
    check(LOTS[-1], "c", torch.float64)


@pytest.mark.parametrize("lot", range(len(LOTS)))
def test_triton(lot: int) -> None:
    with triton_on_cpu("resident"):
        check(LOTS[lot], NAME, torch.float32)


def test_triton_in_float64() -> None:
    with triton_on_cpu("resident"):
        check(LOTS[-1], NAME, torch.float64)
