"""A model, or one shape -> its kernels tuned on this machine's GPU, ahead of time: what `kvt tune` does.

Nothing here measures: it runs what is to be tuned once with `autotune="on"`, and the launchers of the kernels do the
rest (`kernels/tune`).  A lowering without block sizes has nothing to tune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import kvt_compile.kernels.op.ops  # noqa: F401 - registers torch.ops.kvt
from kvt_compile.backend import kvt_backend
from kvt_compile.kernels import tune
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.tune.progress import Progress, Step
from kvt_compile.topk import TopK, resolve


@dataclass(frozen=True)
class Shape:
    """One attention: q `[B, H, Nq, D]`, k and v `[B, H, Nk, D]`, and what is computed with them."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    topk: TopK = 0.5
    score: str | None = None
    """In the score language; None: s / sqrt(D).  Captured tensors c0, c1, ... are random, in `dtype`, and as large as
    their coordinates say."""

    @property
    def score_text(self) -> str:
        return self.score or f"{max(self.head_dim, 1) ** -0.5!r}*s"

    def captured(self, device: torch.device) -> list[Tensor]:
        """Raises ValueError for an index that does not say how large its dimension is, and for a tensor left out."""
        extents = dict(zip("bhij", (self.batch, self.heads, self.queries, self.keys), strict=True))
        shapes: dict[int, list[int]] = {}
        for load in language.loads(language.parse(self.score_text)):
            if not all(isinstance(x, sympy.Symbol) and str(x) in extents for x in load.index):
                raise ValueError(
                    f"{language.to_text(load)}: the size of a captured tensor is read from plain coordinates b, h, i, "
                    "j, as in c0[h, i, j]; for other indices tune the model itself"
                )
            shape = [extents[str(x)] for x in load.index]
            if shapes.setdefault(load.slot, shape) != shape:
                raise ValueError(f"c{load.slot} is indexed in two ways that disagree about its shape")
        if sorted(shapes) != list(range(len(shapes))):
            raise ValueError(f"captured tensors are numbered from c0 on, found {', '.join(f'c{n}' for n in shapes)}")
        return [torch.randn(shapes[n], device=device).to(self.dtype) for n in sorted(shapes)]


def tune_shape(shape: Shape, device: torch.device, *, backward: bool, progress: Progress) -> list[Step]:
    """Tunes the kernels of one shape: the forward, and with `backward` those for dq, dk, dv and captured tensors.

    Returns the last step of every kernel that was measured now.  Raises ValueError for a score that cannot be read or
    captured tensors whose shapes it does not tell.
    """
    captured = shape.captured(device)
    q, k, v = (
        torch.randn(shape.batch, shape.heads, n, shape.head_dim, device=device).to(shape.dtype)
        for n in (shape.queries, shape.keys, shape.keys)
    )
    tune.request(KernelSpec.of(q, k, v, captured, shape.score_text), "on")
    for x in (q, k, v, *captured):
        x.requires_grad_(backward)

    def run() -> None:
        out = torch.ops.kvt.attention(
            q, k, v, captured, shape.score_text, "p", resolve(shape.topk, shape.keys), [], 0.0, None, "auto"
        )[0]
        if backward:
            out.backward(torch.randn_like(out))

    return _watched(run, progress)


def tune_model(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    *,
    options: Mapping[str, Any],
    autocast: torch.dtype | None,
    backward: bool,
    progress: Progress,
) -> list[Step]:
    """Tunes the kernels of every site of a model, by one run of it, compiled.

    Args:
        model: moved to `device`; in training mode when `backward`.
        args, kwargs: its inputs, of the shapes it will be used with.
        options: any of `kvt_compile.config.Options` but autotune.
        autocast: the dtype of automatic mixed precision, None without.
        backward: run the backward too.

    Returns the last step of every kernel that was measured now.  Raises as the backend does.
    """
    model = model.to(device).train(backward)
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), dict(kwargs)))
    compiled = torch.compile(model, backend=kvt_backend, options={**options, "autotune": "on"})

    def run() -> None:
        with torch.set_grad_enabled(backward):
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                out = compiled(*args, **kwargs)
            leaves = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
            if leaves:
                torch.autograd.backward(leaves, [torch.randn_like(x) for x in leaves])

    return _watched(run, progress)


def _watched(run: Callable[[], None], progress: Progress) -> list[Step]:
    finished: list[Step] = []

    def note(step: Step) -> None:
        if step.winner is not None:
            finished.append(step)
        progress(step)

    with tune.watching(note):
        run()
    return finished
