"""A model and batches -> how much attention mass and how much output error each choice gives at each attention.

    run the dense model once, and at every attention, for every choice (a k, or a selection):
        mass   sum of the softmax weights of the keys it keeps, averaged over heads and queries
        error  |out(choice) - out(all keys)| / |out(all keys)|

Everything is kept per example and nothing else is kept: scores exist for a few rows at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvt_compile.calibration.choose import Choice
from kvt_compile.calibration.data import Batch, CalibrationError
from kvt_compile.capture.capture import CaptureError
from kvt_compile.observe import AttentionCall, SiteCall, observe
from kvt_compile.rewrite import RewriteResult, rewrite
from kvt_compile.topk import resolve

Step = Callable[[], None]
"""Called once for every batch that was run: what a progress bar counts."""


Choices = Callable[[SiteCall], Sequence[Choice]]
"""What an attention can choose from."""
Name = tuple[str, int]
"""Module path, and which of the module's attentions."""


@dataclass(frozen=True)
class Curve:
    """One attention (of a module that has several, or is called several times, each is its own)."""

    path: str
    number: int
    keys: int
    """The most keys it had."""
    choices: tuple[Choice, ...]
    mass: Tensor
    """[examples, choices], float64 on the CPU."""
    error: Tensor
    """[examples, choices], of the attention's own output."""
    kept: Tensor
    """[choices]: the share of the keys that is kept."""
    grid: str = ""
    """Where its tokens stand, if that is known."""


class Runner:
    """Runs a model with all keys, or with less at some attentions, and lets somebody look.

    The model is captured once for each shape of its inputs; one that is no single graph goes through torch.compile's
    capture at every run.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any], keep: Mapping[str, Any]) -> None:
        """keep: what the captured model keeps by itself, `{"topk": 1.0}` or a selection that carries the grid."""
        self.model, self.options = model, options
        self._options = {**options, **keep, "force_rewrite": True}
        self._captured: dict[Any, RewriteResult | None] = {}

    @property
    def left(self) -> tuple[tuple[str, str], ...]:
        """Attentions that stay dense whatever is chosen, and why, of the first graph."""
        result = next((x for x in self._captured.values() if x is not None), None)
        sites = result.report.sites if result else ()
        return tuple((site.module, site.reason) for site in sites if site.outcome == "dense")

    def __call__(self, batch: Batch, callback: Callable[[SiteCall], Tensor | None]) -> Tensor:
        """The model's floating-point outputs, flattened and side by side: `[examples, values]` in float64."""
        result = self._graph(batch)
        if result is None:
            output = observe(self.model, batch.args, callback, kwargs=batch.kwargs, **self._options)
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
            return rewrite(self.model, *batch.args, example_kwargs=batch.kwargs, **self._options)
        except CaptureError:
            return None

    def dense(self, batch: Batch) -> Tensor:
        """The output with all keys."""
        return self(batch, lambda call: None if call.keeps_own else under(call, 1.0).output())

    def with_policy(self, batch: Batch, policy: Mapping[str, Choice]) -> Tensor:
        """The output where each attention named keeps what its choice says, and any other keeps all."""
        return self(batch, lambda call: _output(call, policy))

    def mass_with_policy(self, batch: Batch, policy: Mapping[str, Choice]) -> dict[Name, Tensor]:
        """The same run; mass inside the kept keys, `[examples]` for each attention, at the scores it then has."""
        found: dict[Name, Tensor] = {}

        def look(call: SiteCall, name: Name) -> Tensor | None:
            if name[0] in policy:
                found[name] = per_example(masses(call, [policy[name[0]]])[0], batch.size)[:, 0]
            return _output(call, policy)

        self(batch, numbered(look))
        return found


def numbered(look: Callable[[SiteCall, Name], Tensor | None]) -> Callable[[SiteCall], Tensor | None]:
    """A callback of one run that is told as well which of its module's attentions a call is."""
    counts: defaultdict[str, int] = defaultdict(int)

    def callback(call: SiteCall) -> Tensor | None:
        name = (call.where.module, counts[call.where.module])
        counts[name[0]] += 1
        return look(call, name)

    return callback


def _output(call: SiteCall, policy: Mapping[str, Choice]) -> Tensor | None:
    path = call.where.module
    return None if path not in policy and call.keeps_own else under(call, policy.get(path, 1.0)).output()


def under(call: SiteCall, choice: Choice) -> SiteCall:
    """The call as it is where its attention keeps what a choice says."""
    if isinstance(choice, str):
        assert isinstance(call, AttentionCall)
        return call.under(choice)
    topk = resolve(choice, call.shape[3])
    return replace(call, topk=topk, select="") if isinstance(call, AttentionCall) else replace(call, topk=topk)


def measure(run: Runner, batches: Sequence[Batch], choices: Choices, step: Step) -> list[Curve]:
    """The curves of every attention, in the order the model runs them."""
    mass: defaultdict[Name, list[Tensor]] = defaultdict(list)
    error: defaultdict[Name, list[Tensor]] = defaultdict(list)
    kept: dict[Name, Tensor] = {}
    grids: dict[Name, str] = {}
    keys: defaultdict[Name, int] = defaultdict(int)
    chosen: dict[Name, tuple[Choice, ...]] = {}
    for batch in batches:

        def look(call: SiteCall, name: Name, batch: Batch = batch) -> Tensor | None:
            if call.keeps_own:
                return None  # the model has chosen already
            if name not in chosen:  # what its first inputs have, so that curves of all batches are along the same
                chosen[name] = tuple(choices(call))
                grids[name] = str(call.geometry or "") if isinstance(call, AttentionCall) else ""
            keys[name] = max(keys[name], call.shape[3])
            inside, kept[name] = masses(call, chosen[name])
            mass[name].append(per_example(inside, batch.size))
            error[name].append(errors(call, chosen[name], batch.size))
            return under(call, 1.0).output()

        if not run(batch, numbered(look)).isfinite().all():
            raise CalibrationError("the model's output is not finite on the data, so there is nothing to compare with")
        step()
    return [
        Curve(*name, keys[name], chosen[name], torch.cat(mass[name]), torch.cat(error[name]), kept[name], grids[name])
        for name in mass
    ]


def masses(call: SiteCall, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """[B, choices]: the mass of the weights of the kept keys, averaged over heads and queries; a row without a valid
    key has 1.  [choices]: the share of the keys that is kept.

    Keys tied with the k-th, which k-NN attention keeps as well, are not counted: the true mass is never smaller.
    """
    batch, heads, queries, keys = call.shape
    by_k = [n for n, x in enumerate(choices) if not isinstance(x, str) and resolve(x, keys) < keys]
    last = torch.tensor([resolve(choices[n], keys) - 1 for n in by_k], dtype=torch.int64)  # type: ignore[arg-type]
    selected = {n: under(call, x) for n, x in enumerate(choices) if isinstance(x, str)}
    # what is neither keeps every key
    total = torch.full((batch, len(choices)), float(heads * queries), dtype=torch.float64)
    share = torch.ones(len(choices), dtype=torch.float64)
    share[by_k] = (last + 1).double() / max(keys, 1)
    total[:, [*by_k, *selected]] = 0.0
    share[[*selected]] = 0.0
    for rows in call.scores():
        weights = rows.t.softmax(-1)
        if by_k:
            inside = weights.sort(-1, descending=True).values.cumsum(-1)[..., last.to(rows.t.device)]
            inside = inside.nan_to_num(nan=1.0).clamp(max=1.0)
            total[:, by_k] += inside.double().sum((1, 2)).cpu()
        for n, site in selected.items():
            assert isinstance(site, AttentionCall)
            # of what is not ranked one map is that of the whole batch, and often of all heads
            allowed = site.kept(rows) if site.ranks else site.allowed(rows)
            kept = torch.ones((), dtype=torch.bool) if allowed is None else allowed
            held = (weights * kept).sum(-1).nan_to_num(nan=1.0).clamp(max=1.0)
            total[:, n] += held.double().sum((1, 2)).cpu()
            share[n] += float(kept.double().mean()) * len(rows.queries) / max(queries, 1)
    return total / max(heads * queries, 1), share


def errors(call: SiteCall, choices: Sequence[Choice], examples: int) -> Tensor:
    """[examples, choices]: relative error of the attention's output in the Euclidean norm."""
    exact = under(call, 1.0).output()

    def squares(x: Tensor) -> Tensor:
        return per_example(x.double().reshape(x.shape[0], -1).square().sum(1, keepdim=True).cpu(), examples)

    size = squares(exact).clamp(min=torch.finfo(torch.float64).tiny)
    columns = [(squares(under(call, x).output() - exact) / size).sqrt() for x in choices]
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
