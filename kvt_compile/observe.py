"""A model and inputs -> one call per attention site, with the tensors that reach it, while the model runs once.

    model --capture, passes--> graph with kvt:: nodes --each node replaced by a hook--> run it
                                                        hook: SiteCall -> callback -> (the site's output as ever)

What the pictures and the choice of k are made from.  A `SiteCall` holds q, k, v as the model made them and computes
the final scores t = f(q kT) in chunks of rows, so that nothing of size Nq x Nk is ever held for all queries.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from kvt_compile.capture.capture import capture, run_through_dynamo
from kvt_compile.capture.unchanged import unchanged
from kvt_compile.config import OptionError, Options, make_options
from kvt_compile.explain import build_report
from kvt_compile.kernels.language.evaluate import compile_text, tile
from kvt_compile.kernels.language.grid import Environment, Grid
from kvt_compile.kernels.op.selection import Selection, selection_of
from kvt_compile.kernels.plain.select import row_threshold, row_threshold_by_mass, without_late_ties
from kvt_compile.kernels.plain.tiling import budget_of, chunks
from kvt_compile.passes.finding.describe import place
from kvt_compile.passes.pipeline import PassResult, nested_graphs, run_passes, unmet
from kvt_compile.passes.site import Where
from kvt_compile.report.facts import SiteReport
from kvt_compile.rewrite import RewriteResult
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.text import parse
from kvt_compile.select.values import Mass, Selector, TopK, for_node
from kvt_compile.topk import resolve

KVT = torch.ops.kvt


class Scores(NamedTuple):
    """Some rows of a site's final scores."""

    queries: range
    """Which queries the rows are."""
    t: Tensor
    """[B, H, len(queries), Nk] in float32 (float64 where the model is): what is compared and goes into the softmax."""


@dataclass(frozen=True, eq=False)
class SiteCall:
    """One attention of the model while it runs.  `AttentionCall` or `SoftmaxCall`."""

    number: int
    """Position among the rewritten sites of the model, from 0."""
    where: Where
    """Module path, file and line in the model."""
    report: SiteReport | None
    """The row of the site in the report, where there is one."""
    topk: int
    """Keys each query keeps, at most Nk."""
    lowering: str

    @property
    def keeps_own(self) -> bool:
        """Whether the model selects keys by itself here, and topk is its own k."""
        return self.report is not None and self.report.keeps_own

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Nq, Nk) of the scores."""
        raise NotImplementedError

    def scores(self, queries: Sequence[int] | None = None, rows: int | None = None) -> Iterator[Scores]:
        """Final scores of the given queries (default: all), in ascending runs of at most `rows` of them.

        By default a chunk has about as many elements as a tile of the ATen lowering.  Raises IndexError for a query
        that does not exist.
        """
        batch, heads, count, keys = self.shape
        step = rows or max(1, budget_of(self._scores_device.type) // max(batch * heads * keys, 1))
        for run in _runs(range(count) if queries is None else queries, count):
            for part in chunks(len(run), step):
                at = range(run.start + part.start, run.start + part.stop)
                with torch.autocast(self._scores_device.type, enabled=False):
                    yield Scores(at, self._rows(at))

    def output(self, topk: int | None = None) -> Tensor:
        """What the site computes with exactly `topk` (default: its own), without dropout: out [B, H, Nq, Dv] of an
        `AttentionCall`, the attention weights in their tensor's own shape of a `SoftmaxCall`."""
        raise NotImplementedError

    def kept(self, rows: Scores) -> Tensor:
        """Which keys the site keeps of some rows: bool, in the shape of their scores."""
        return kept_keys(rows.t, self.topk)

    @property
    def _scores_device(self) -> torch.device:
        raise NotImplementedError

    def _rows(self, at: range) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AttentionCall(SiteCall):
    """A fused site.  q [B, H, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv]; `captured`, `score`, `weight`, `sizes`,
    `select`, `grid` and `prefix` as for `kvt::attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: Sequence[Tensor]
    score: str
    weight: str
    sizes: Sequence[int]
    select: str = ""
    grid: Sequence[int] | None = None
    prefix: int = 0

    @property
    def geometry(self) -> Geometry | None:
        """Where its tokens stand, if its selection asks."""
        return None if self.grid is None else Geometry(tuple(self.grid), self.prefix)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.q.shape
        return batch, heads, queries, self.k.shape[2]

    def output(self, topk: int | None = None) -> Tensor:
        out, _, _ = KVT.attention(
            self.q, self.k, self.v, self.captured, self.score, self.weight, self.topk if topk is None else topk,
            self.sizes, 0.0, None, self.lowering, 0.0, None, self.select, self.grid, self.prefix,
        )  # fmt: skip
        result: Tensor = out
        return result

    def under(self, select: Selector | str | None) -> AttentionCall:
        """The same call under another selection (None: every key) on the same grid."""
        keys = self.shape[3]
        if select is None:
            return replace(self, topk=keys, select="")
        text, best = for_node(parse(select) if isinstance(select, str) else select)
        return replace(self, topk=keys if best is None else resolve(best, keys), select=text)

    def kept(self, rows: Scores) -> Tensor:
        allowed = self.allowed(rows)
        t = rows.t if allowed is None else rows.t.masked_fill(~allowed, -torch.inf)
        return kept_keys(t, self.topk, None if self._selection is None else self._selection.rank)

    def allowed(self, rows: Scores) -> Tensor | None:
        """Which keys the selection allows before anything is ranked: bool, broadcastable to the scores; None: all."""
        if self._selection is None:
            return None
        batch, heads, _, keys = self.shape
        grid = Grid(range(batch), range(heads), rows.queries, range(keys), rows.t.device, rows.t.dtype)
        return self._selection.map(heads, [grid.coordinate(x) for x in "bhij"], self._chosen)

    @property
    def ranks(self) -> bool:
        """Whether it keeps less than it allows."""
        return self.topk < self.shape[3] or (self._selection is not None and self._selection.rank is not None)

    @cached_property
    def _selection(self) -> Selection | None:
        return selection_of(self.select, self.grid, self.prefix, self.shape[2], self.shape[3])

    @cached_property
    def _chosen(self) -> dict[Selector, Tensor]:
        return {} if self._selection is None else self._selection.tables(self.q, self.k)

    @property
    def _scores_device(self) -> torch.device:
        return self.q.device

    def _rows(self, at: range) -> Tensor:
        batch, heads, _, keys = self.shape
        accumulate = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        q = self.q[:, :, at.start : at.stop].to(accumulate)
        k = self.k.to(accumulate)
        # query heads that share a key head become rows of one product
        grouped = q.reshape(batch, k.shape[1], -1, q.shape[-1]) @ k.transpose(-1, -2)
        grid = Grid(range(batch), range(heads), at, range(keys), q.device, accumulate)
        env = Environment(grid, self.captured, self.sizes, s=grouped.view(batch, heads, len(at), keys))
        return tile(compile_text(self.score), env)


@dataclass(frozen=True, eq=False)
class SoftmaxCall(SiteCall):
    """A scores-kept site: the model's own scores, whose dimension `dim` runs over the keys.

    The other dimensions are read as [..., heads, queries]; all before the heads are the batch.
    """

    raw: Tensor
    dim: int
    dtype: torch.dtype
    """Of the weights."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = self._as_rows().shape
        return batch, heads, queries, keys

    def output(self, topk: int | None = None) -> Tensor:
        result: Tensor = KVT.topk_softmax(
            self.raw, self.dim, self.topk if topk is None else topk, self.dtype, self.lowering
        )
        return result

    @property
    def _scores_device(self) -> torch.device:
        return self.raw.device

    def _as_rows(self) -> Tensor:
        x = self.raw.movedim(self.dim, -1)
        while x.dim() < 4:
            x = x.unsqueeze(0)
        return x.flatten(0, -4)

    def _rows(self, at: range) -> Tensor:
        rows = self._as_rows()[:, :, at.start : at.stop]
        return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)


Callback = Callable[[SiteCall], Tensor | None]


def observe(
    subject: RewriteResult | nn.Module | ExportedProgram,
    inputs: Sequence[Any],
    callback: Callback,
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Runs a model once without gradients and calls `callback` at every rewritten attention, in order.

    Args:
        subject: a model, or what `rewrite` returned.  A model that is not rewritten yet is rewritten for this run
            alone (through Dynamo, graph breaks included); it is not changed, buffers and random state included.
        inputs: the model's positional inputs.
        callback: is given the `SiteCall`.  A tensor it returns stands for the site's output (`SiteCall.output`) in
            the rest of the run; None leaves the site as it is.
        kwargs: the model's keyword inputs.
        options: options of `kvt_compile.config.Options`, for a model that is not rewritten yet.  `topk=1.0,
            force_rewrite=True` runs the dense model.

    Returns the model's output.  Raises OptionError, and TypeError for anything that is not a model.
    """
    kwargs = kwargs or {}
    hook = _Hook(callback)
    rows: tuple[SiteReport, ...] = ()
    model: Any = subject
    if isinstance(subject, RewriteResult):
        model, rows = subject.module, subject.report.sites
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned: its model
    with torch.no_grad():
        if isinstance(model, fx.GraphModule) and has_sites(model):
            if options:
                raise OptionError(f"the model is rewritten already: {', '.join(options)} cannot be changed any more")
            with unchanged(model):
                return hook.into(_copy(model), rows)(*inputs, **kwargs)
        chosen = make_options(options)
        if isinstance(model, fx.GraphModule | ExportedProgram):
            captured = capture(model, inputs, kwargs)
            result = run_passes(
                captured.graph,
                chosen.policy,
                lowering=chosen.lowering,
                tolerance=chosen.topk_tolerance,
                origins=captured.origins,
            )
            _check_patterns(chosen, [result])
            program = captured.program
            module: Any = captured.graph if program is None else program.module(check_guards=False)
            with unchanged(module):
                return hook.into(module, build_report([result], chosen).sites)(*inputs, **kwargs)
        return _observe_module(model, inputs, kwargs, hook, chosen)


def kept_keys(t: Tensor, topk: int, rank: TopK | Mass | None = None) -> Tensor:
    """Which keys k-NN attention keeps, bool, in the shape of final scores t [..., Nk]: ties at the threshold are,
    unless `rank` says otherwise."""
    k = max(1, min(topk, t.shape[-1]))
    _, threshold = row_threshold_by_mass(t, rank.p) if isinstance(rank, Mass) else row_threshold(t, k)
    if isinstance(rank, TopK) and rank.ties == "lowest":
        t = without_late_ties(t, threshold, k)
    return (t >= threshold) & (t > -torch.inf)


def _observe_module(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], hook: _Hook, options: Options
) -> Any:
    results: list[PassResult] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results.append(run_passes(gm, options.policy, lowering=options.lowering, tolerance=options.topk_tolerance))
        forward: Callable[..., Any] = hook.into(gm, build_report(results[-1:], options).sites).forward
        return forward

    output = run_through_dynamo(model, args, kwargs, backend)
    _check_patterns(options, results)
    return output


def _check_patterns(options: Options, results: Iterable[PassResult]) -> None:
    if wrong := unmet(options.policy, list(results)):
        raise OptionError(wrong)


class _Hook:
    """Puts the callback in the place of every kvt:: node; counts sites over all graphs of the model."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._count = 0

    def into(self, gm: Any, rows: Iterable[SiteReport]) -> Any:
        """The graph module itself, changed."""
        by_module: defaultdict[str, list[SiteReport]] = defaultdict(list)
        for rewritten in rows:
            if rewritten.outcome != "dense":
                by_module[rewritten.module].append(rewritten)
        for graph in nested_graphs(gm):
            for node in graph.graph.nodes:
                if node.target not in _HOOKS:
                    continue
                where = place(node)
                same = by_module[where.module]
                row = same.pop(0) if same else None
                node.target = _HOOKS[node.target](self._callback, self._count, where, row)
                self._count += 1
            graph.recompile()
        return gm


def _attention_hook(callback: Callback, number: int, where: Where, row: SiteReport | None) -> Callable[..., Any]:
    def observed_attention(
        q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor] | None, score: str, weight: str, topk: int,
        sizes: Sequence[int] | None, dropout_p: float, seed: Tensor | None, lowering: str, tolerance: float = 0.0,
        draw: Sequence[int] | None = None, select: str = "", grid: Sequence[int] | None = None, prefix: int = 0,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        kept = min(topk, k.shape[2])
        call = AttentionCall(
            number, where, row, kept, lowering, q, k, v, captured or (), score, weight, sizes or (),
            select, grid, prefix,
        )  # fmt: skip
        instead = callback(call)
        if instead is not None:
            return instead, None, None  # a rewritten graph reads the output alone
        out: tuple[Tensor, ...] = KVT.attention(
            q, k, v, captured, score, weight, topk, sizes, dropout_p, seed, lowering, tolerance, draw,
            select, grid, prefix,
        )  # fmt: skip
        return out

    return observed_attention


def _softmax_hook(callback: Callback, number: int, where: Where, row: SiteReport | None) -> Callable[..., Any]:
    def observed_softmax(
        scores: Tensor, dim: int, topk: int, dtype: torch.dtype, lowering: str, tolerance: float = 0.0
    ) -> Tensor:
        axis = dim % max(scores.dim(), 1)
        call = SoftmaxCall(number, where, row, min(topk, scores.shape[axis]), lowering, scores, axis, dtype)
        instead = callback(call)
        if instead is not None:
            return instead
        out: Tensor = KVT.topk_softmax(scores, dim, topk, dtype, lowering, tolerance)
        return out

    return observed_softmax


_HOOKS: dict[Any, Callable[..., Callable[..., Any]]] = {
    KVT.attention.default: _attention_hook,
    KVT.topk_softmax.default: _softmax_hook,
}


def has_sites(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one nested in it, is rewritten already."""
    return any(node.target in _HOOKS for graph in nested_graphs(gm) for node in graph.graph.nodes)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The same parameters and submodules with a graph of its own, and so for the graphs nested in it."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node in new.graph.nodes:
        if node.op == "get_attr" and isinstance(body := getattr(new, str(node.target), None), fx.GraphModule):
            setattr(new, str(node.target), _copy(body))
    return new


def _runs(numbers: Sequence[int], count: int) -> Iterator[range]:
    """1, 2, 3, 7 -> range(1, 4), range(7, 8).  Raises IndexError for a number outside [0, count)."""
    if isinstance(numbers, range) and numbers.step == 1:
        ordered, runs = [*numbers[:1], *numbers[-1:]], [numbers]
    else:
        ordered, runs = sorted(set(numbers)), []
        for number in ordered:
            if runs and number == runs[-1].stop:
                runs[-1] = range(runs[-1].start, number + 1)
            else:
                runs.append(range(number, number + 1))
    for number in ordered:
        if not 0 <= number < count:
            raise IndexError(f"there is no query {number}: the queries are 0 to {count - 1}")
    return iter(run for run in runs if run)
