"""A model and batches -> how much attention mass and how much output error each k gives at each attention.

    run the dense model once, and at every attention, for every k of the grid:
        mass   sum of the k largest softmax weights, averaged over heads and queries
        error  |out(k) - out(all keys)| / |out(all keys)|

Everything is kept per example and nothing else is kept: scores exist for a few rows at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvt_compile.calibration.data import Batch, CalibrationError
from kvt_compile.capture.capture import CaptureError
from kvt_compile.observe import SiteCall, observe
from kvt_compile.rewrite import RewriteResult, rewrite
from kvt_compile.topk import TopK, resolve

Step = Callable[[], None]
"""Called once for every batch that was run: what a progress bar counts."""


@dataclass(frozen=True)
class Curve:
    """One attention (of a module that has several, or is called several times, each is its own)."""

    path: str
    keys: int
    """The most keys it had."""
    mass: Tensor
    """[examples, grid], float64 on the CPU."""
    error: Tensor
    """[examples, grid], of the attention's own output."""


class Runner:
    """Runs a model with all keys, or with another k at some attentions, and lets somebody look.

    The model is captured once for each shape of its inputs; one that is no single graph goes through torch.compile's
    capture at every run.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._model = model
        self._options = {**options, "topk": 1.0, "force_rewrite": True}
        self._captured: dict[Any, RewriteResult | None] = {}

    def __call__(self, batch: Batch, callback: Callable[[SiteCall], Tensor | None]) -> Tensor:
        """The model's floating-point outputs, flattened and side by side: `[examples, values]` in float64."""
        result = self._graph(batch)
        if result is None:
            output = observe(self._model, batch.args, callback, kwargs=batch.kwargs, **self._options)
        elif result.report.counts["sites"] == result.report.counts["dense"]:  # nothing to look at
            output = result.module(*batch.args, **batch.kwargs)
        else:
            output = observe(result, batch.args, callback, kwargs=batch.kwargs)
        return _flat(output, batch.size)

    def _graph(self, batch: Batch) -> RewriteResult | None:
        for key in (batch.shapes, batch.shapes_but_first):
            if key in self._captured:
                return self._captured[key]
        result = self._capture(batch)
        # a traced graph takes any number of examples, an exported one as many as it was captured with
        traced = result is not None and result.program is None
        self._captured[batch.shapes_but_first if traced else batch.shapes] = result
        return result

    def _capture(self, batch: Batch) -> RewriteResult | None:
        try:
            return rewrite(self._model, *batch.args, example_kwargs=batch.kwargs, **self._options)
        except CaptureError:
            return None

    def dense(self, batch: Batch) -> Tensor:
        """The output with all keys."""
        return self(batch, lambda call: None)

    def with_policy(self, batch: Batch, topk: Mapping[str, TopK]) -> Tensor:
        """The output where each attention named keeps so many keys, and any other keeps all."""
        return self(batch, lambda call: _output(call, topk))

    def mass_with_policy(self, batch: Batch, topk: Mapping[str, TopK]) -> dict[tuple[str, int], Tensor]:
        """The same run; mass inside the kept keys, `[examples]` for each attention, at the scores it then has."""
        found: dict[tuple[str, int], Tensor] = {}
        counts: defaultdict[str, int] = defaultdict(int)

        def look(call: SiteCall) -> Tensor | None:
            path = call.where.module
            if path in topk:
                mass = per_example(masses(call, [topk[path]]), batch.size)
                found[path, counts[path]] = mass[:, 0]
                counts[path] += 1
            return _output(call, topk)

        self(batch, look)
        return found


def _output(call: SiteCall, topk: Mapping[str, TopK]) -> Tensor | None:
    k = topk.get(call.where.module)
    return None if k is None else call.output(resolve(k, call.shape[3]))


def measure(run: Runner, batches: Sequence[Batch], grid: Sequence[TopK], step: Step) -> list[Curve]:
    """The curves of every attention, in the order the model runs them."""
    mass: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
    error: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
    keys: defaultdict[tuple[str, int], int] = defaultdict(int)
    for batch in batches:
        counts: defaultdict[str, int] = defaultdict(int)

        def look(call: SiteCall, batch: Batch = batch, counts: defaultdict[str, int] = counts) -> None:
            name = (call.where.module, counts[call.where.module])
            counts[call.where.module] += 1
            if call.keeps_own:
                return  # the model has chosen already
            keys[name] = max(keys[name], call.shape[3])
            mass[name].append(per_example(masses(call, grid), batch.size))
            error[name].append(errors(call, grid, batch.size))

        if not run(batch, look).isfinite().all():
            raise CalibrationError("the model's output is not finite on the data, so there is nothing to compare with")
        step()
    return [Curve(name[0], keys[name], torch.cat(mass[name]), torch.cat(error[name])) for name in mass]


def masses(call: SiteCall, grid: Sequence[TopK]) -> Tensor:
    """[B, grid]: the mass of the k largest weights, averaged over heads and queries.  A row without a valid key has 1.

    Keys tied with the k-th, which k-NN attention keeps as well, are not counted: the true mass is never smaller.
    """
    batch, heads, queries, keys = call.shape
    last = torch.tensor([resolve(k, keys) - 1 for k in grid])
    total = torch.zeros(batch, len(grid), dtype=torch.float64)
    for rows in call.scores():
        inside = rows.t.softmax(-1).sort(-1, descending=True).values.cumsum(-1)[..., last.to(rows.t.device)]
        inside = inside.nan_to_num(nan=1.0).clamp(max=1.0)
        inside[..., last.to(inside.device) == keys - 1] = 1.0
        total += inside.double().sum((1, 2)).cpu()
    return total / max(heads * queries, 1)


def errors(call: SiteCall, grid: Sequence[TopK], examples: int) -> Tensor:
    """[examples, grid]: relative error of the attention's output in the Euclidean norm."""
    exact = call.output(call.shape[3])

    def squares(x: Tensor) -> Tensor:
        return per_example(x.double().reshape(x.shape[0], -1).square().sum(1, keepdim=True).cpu(), examples)

    size = squares(exact).clamp(min=torch.finfo(torch.float64).tiny)
    columns = [(squares(call.output(resolve(k, call.shape[3])) - exact) / size).sqrt() for k in grid]
    return torch.cat(columns, 1)


def per_example(x: Tensor, examples: int) -> Tensor:
    """[B, ...] -> [examples, ...]: the mean of what belongs to an example (the windows of an image, say).

    Where the rows cannot be told apart (queries that all examples share), every example gets the mean of all.
    """
    if x.shape[0] % examples:
        return x.mean(0, keepdim=True).expand(examples, *x.shape[1:])
    return x.reshape(examples, -1, *x.shape[1:]).mean(1)


def compare(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, relative error) of two outputs `[examples, values]`, each `[examples]`."""
    size = exact.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    cosine = (found * exact).sum(1) / (found.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny) * size)
    same = (found == exact).all(1)
    return torch.where(same, 1.0, cosine.clamp(max=1.0)), (found - exact).norm(dim=1) / size


def _flat(output: Any, examples: int) -> Tensor:
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    rows = [x.detach().double().cpu().reshape(examples, -1) for x in leaves if x.dim() and x.shape[0] == examples]
    if not rows:
        raise CalibrationError(
            f"the model returns no floating-point tensor with {examples} rows, one for each example of the batch, so "
            "its output cannot be compared example by example"
        )
    return torch.cat(rows, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
