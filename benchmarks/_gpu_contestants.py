"""A cell -> its contestants on a device: dense SDPA, FlexAttention, eager KVT, torch.compile of it, ours twice."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from _gpu_plan import COMPILED, EAGER, ERROR, FLEX, OURS, SDPA, TOLERANCE, TOLERANT, Cell, Measured, Prepare
from _shared import eager_kvt, sdpa, step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvt_compile.kernels.op.ops  # noqa: F401 - registers the ops
from kvt_compile.kernels import lowerings, tune
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.tune.timing import Clock, Run

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class Contestants:
    """What runs in one cell, over one set of random inputs."""

    def __init__(
        self, cell: Cell, device: torch.device, clock: Clock, lowering: str = "auto", autotune: tune.Mode = "cached"
    ) -> None:
        self.cell, self.clock, self.lowering = cell, clock, lowering
        torch.manual_seed(0)
        shape = (cell.batch, cell.heads, cell.size, cell.dim)
        dtype: torch.dtype = getattr(torch, cell.dtype)
        self.leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_(cell.backward) for _ in range(3)]
        self.grad = torch.randn(shape, device=device, dtype=dtype)
        self.score = f"{cell.dim**-0.5!r}*s"
        self.spec = KernelSpec.of(*self.leaves, score=self.score)
        tune.request(self.spec, autotune)
        self.backend = ""

    def prepare(self) -> dict[str, Prepare]:
        """Name -> what builds the timed function, the quickest to build first."""
        return {
            OURS: lambda: self._timed(partial(self.ours, tolerance=0.0)),
            TOLERANT: lambda: self._timed(partial(self.ours, tolerance=TOLERANCE)),
            SDPA: self._best_sdpa,
            EAGER: lambda: self._timed(partial(eager_kvt, topk=self.cell.topk)),
            COMPILED: lambda: self._timed(partial(torch.compile(eager_kvt, dynamic=False), topk=self.cell.topk)),
            FLEX: self._flex,
        }

    def ours(self, q: Tensor, k: Tensor, v: Tensor, tolerance: float) -> Tensor:
        out: Tensor = torch.ops.kvt.attention(
            q, k, v, [], self.score, "p", self.cell.topk, [], 0.0, None, self.lowering, tolerance
        )[0]
        return out

    def error(self) -> float:
        """|out - exact| / |exact| of ours on the first two heads, against the definition in float64."""
        q, k, v = (x.detach()[:1, :2] for x in self.leaves)
        exact = eager_kvt(q.double(), k.double(), v.double(), self.cell.topk)
        return float((self.ours(q, k, v, 0.0).double() - exact).norm() / exact.norm())

    def judge(self, result: Measured) -> None:
        """Takes our numbers back where the result is wrong: a wrong kernel has no time."""
        chosen = lowerings.choose(self.lowering, self.spec, self.leaves[0].device.type)
        result.notes |= {"sdpa backend": self.backend, "lowering": chosen.name}
        if OURS not in result.ms:
            return
        result.error = self.error()
        if not result.error <= ERROR[self.cell.dtype]:  # NaN too
            for name in (OURS, TOLERANT):
                result.ms.pop(name, None)
                result.peak_mb.pop(name, None)
                result.dropped[name] = f"wrong: relative error {result.error:.1e}, at most {ERROR[self.cell.dtype]:g}"

    def _timed(self, attention: Attention) -> Run:
        q, k, v = self.leaves
        if self.cell.backward:
            return step(lambda: attention(q, k, v), self.leaves, self.grad)

        def forward() -> object:
            with torch.no_grad():
                return attention(q, k, v)

        return forward

    def _best_sdpa(self) -> Run:
        """SDPA with the backend that is fastest here.  Raises RuntimeError when none runs."""
        times: dict[SDPBackend, float] = {}
        reasons: list[str] = []
        for backend in BACKENDS:
            run = self._timed(partial(_with_backend, backend))
            try:
                run()
                times[backend] = statistics.median(self.clock.milliseconds(run) for _ in range(5))
            except RuntimeError as error:  # not for these inputs, or out of memory
                reasons.append(f"{backend.name}: {str(error).splitlines()[0]}")
        if not times:
            raise RuntimeError("; ".join(reasons))
        best = min(times, key=times.__getitem__)
        self.backend = best.name.lower().removesuffix("_attention")
        return self._timed(partial(_with_backend, best))

    def _flex(self) -> Run:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        return self._timed(lambda q, k, v: compiled(q, k, v))


def _with_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)
