"""A cell -> its contestants on a device: dense SDPA, FlexAttention, eager KVT, torch.compile of it, ours twice."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from benchmarks._shared import eager_kvt, sdpa, step
from benchmarks.gpu.cells import COMPILED, EAGER, FLEX, OURS, SDPA, TOLERANCE, TOLERANT, Cell
from benchmarks.gpu.plan import ERROR, Prepare, WrongError
from kvt_compile.kernels import lowerings, tune
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.tune.timing import Clock, Run

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


CHECKED_ROWS = 1024
"""Of a head, at most: the exact scores of all 16,384 would be too many."""


class Contestants:
    """What runs in one cell, over one set of random inputs.

    real: whether kernels compute here.  On a stub inputs hold no numbers, ours is not judged, and rivals, which the
    stub cannot run, get one small head on the CPU.
    """

    def __init__(
        self, cell: Cell, device: torch.device, clock: Clock, lowering: str = "auto", autotune: tune.Mode = "cached",
        real: bool = True,
    ) -> None:  # fmt: skip
        self.cell, self.clock, self.lowering, self.real = cell, clock, lowering, real
        torch.manual_seed(0)
        shape = (cell.batch, cell.heads, cell.size, cell.dim)
        dtype: torch.dtype = getattr(torch, cell.dtype)
        make = torch.randn if real else torch.empty
        self.leaves = [make(shape, device=device, dtype=dtype).requires_grad_(cell.backward) for _ in range(3)]
        self.grad = make(shape, device=device, dtype=dtype)
        self.errors: dict[str, float] = {}
        """Relative errors of ours, once it was judged."""
        self.score = f"{cell.dim**-0.5!r}*s"
        self.spec = KernelSpec.of(*self.leaves, score=self.score, select=cell.select)
        tune.request(self.spec, autotune)
        self.backend = ""

    def prepare(self) -> dict[str, Prepare]:
        """Name -> what builds the timed function, the quickest to build first.  Ours raises WrongError where wrong,
        so that a wrong kernel has no time."""
        return {
            OURS: lambda: self._judged(0.0),
            TOLERANT: lambda: self._judged(TOLERANCE),
            SDPA: self._best_sdpa,
            EAGER: lambda: self._rival(partial(eager_kvt, topk=self.cell.topk)),
            COMPILED: lambda: self._rival(partial(torch.compile(eager_kvt, dynamic=False), topk=self.cell.topk)),
            FLEX: self._flex,
        }

    def ours(self, q: Tensor, k: Tensor, v: Tensor, tolerance: float) -> Tensor:
        out: Tensor = torch.ops.kvt.attention(
            q, k, v, [], self.score, "p", self.cell.topk, [], 0.0, None, self.lowering, tolerance, None,
            self.cell.select, self.cell.grid,
        )[0]  # fmt: skip
        return out

    def lowering_name(self) -> str:
        """Of what runs as ours."""
        return lowerings.choose(self.lowering, self.spec, self.leaves[0].device.type).name

    def _judged(self, tolerance: float) -> Run:
        if self.real:
            if not self.errors:
                self.errors = self.measure_errors()
            worst = max(self.errors, key=lambda name: _size(self.errors[name]))
            if not self.errors[worst] <= ERROR[self.cell.dtype]:  # NaN too
                limit = ERROR[self.cell.dtype]
                raise WrongError(f"relative error {self.errors[worst]:.1e} of {worst}, at most {limit:g}")
        return self.timed_ours(tolerance)

    def timed_ours(self, tolerance: float) -> Run:
        """Ours, judged or not."""
        return self._timed(partial(self.ours, tolerance=tolerance), self.leaves, self.grad)

    def measure_errors(self) -> dict[str, float]:
        """|x - exact| / |exact| of ours, output and gradients, by the definition in float64.

        The first and the last head are looked at; gradients enter from up to CHECKED_ROWS of their rows, evenly chosen.
        """
        places = sorted({(0, 0), (self.cell.batch - 1, self.cell.heads - 1)})
        rows = torch.linspace(0, self.cell.size - 1, min(self.cell.size, CHECKED_ROWS)).long().to(self.grad.device)
        grad = torch.zeros_like(self.grad)
        for b, h in places:
            grad[b, h, rows] = self.grad[b, h, rows]
        with torch.enable_grad():
            out = self.ours(*self.leaves, 0.0)
        gradients = torch.autograd.grad(out, self.leaves, grad) if self.cell.backward else ()
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for b, h in places:
            q, k, v = (x.detach()[b, h].double().requires_grad_(self.cell.backward) for x in self.leaves)
            exact = self._exact(q[rows], k, v, rows)
            found.setdefault("out", []).append((out.detach()[b, h, rows], exact.detach()))
            if self.cell.backward:
                theirs = torch.autograd.grad(exact, (q, k, v), grad[b, h, rows].double())
                for name, x, y in zip(("dq", "dk", "dv"), gradients, theirs, strict=True):
                    found.setdefault(name, []).append((x[b, h], y))
        return {name: max((_relative(x, y) for x, y in pairs), key=_size) for name, pairs in found.items()}

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """Of some rows of one head, in the type of q."""
        selection = selection_of(self.cell.select, self.cell.grid, 0, self.cell.size, self.cell.size)
        if selection is None:
            return eager_kvt(q, k, v, self.cell.topk)
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        keys = torch.arange(self.cell.size, device=q.device)
        allowed = selection.map(1, (zero, zero, rows[:, None], keys), {})
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    def _rival(self, attention: Attention) -> Run:
        if self.real:
            return self._timed(attention, self.leaves, self.grad)
        shape = (1, 1, self.cell.topk + 1, self.cell.dim)
        small = [torch.randn(shape, requires_grad=self.cell.backward) for _ in range(3)]
        return self._timed(attention, small, torch.randn(shape))

    def _timed(self, attention: Attention, leaves: list[Tensor], grad: Tensor) -> Run:
        q, k, v = leaves
        if self.cell.backward:
            return step(lambda: attention(q, k, v), leaves, grad)

        def forward() -> object:
            with torch.no_grad():
                return attention(q, k, v)

        return forward

    def _best_sdpa(self) -> Run:
        """SDPA with the backend that is fastest here.  Raises RuntimeError when none runs."""
        if not self.real:
            return self._rival(sdpa)
        times: dict[SDPBackend, float] = {}
        reasons: list[str] = []
        for backend in BACKENDS:
            run = self._rival(partial(_with_backend, backend))
            try:
                run()
                times[backend] = statistics.median(self.clock.milliseconds(run) for _ in range(5))
            except RuntimeError as error:  # not for these inputs, or out of memory
                reasons.append(f"{backend.name}: {str(error).splitlines()[0]}")
        if not times:
            raise RuntimeError("; ".join(reasons))
        best = min(times, key=times.__getitem__)
        self.backend = best.name.lower().removesuffix("_attention")
        return self._rival(partial(_with_backend, best))

    def _flex(self) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        if not self.cell.grid:
            return self._rival(lambda q, k, v: compiled(q, k, v))
        near = neighbours(self.cell.grid[0], self.cell.window)
        mask = create_block_mask(near, None, None, self.cell.size, self.cell.size, device=str(self.grad.device))
        return self._rival(lambda q, k, v: compiled(q, k, v, block_mask=mask))


def neighbours(side: int, size: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A window of an odd size on a square grid, shifted inward at the border, as FlexAttention takes it."""

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        places = ((i // side, j // side), (i % side, j % side))
        kept = [(key - query.clamp(size // 2, side - 1 - size // 2)).abs() <= size // 2 for query, key in places]
        return kept[0] & kept[1]

    return near


def _with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _size(error: float) -> float:
    """NaN is the largest."""
    return error if error == error else float("inf")
