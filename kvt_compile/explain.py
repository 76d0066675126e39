"""`explain(model, *inputs)`: what torch.compile(backend="kvt") would find and do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from kvt_compile.capture.capture import capture, run_through_dynamo
from kvt_compile.capture.environment import LOCK
from kvt_compile.capture.outside import calls_outside
from kvt_compile.config import NAMES, OptionError, Options, make_options
from kvt_compile.passes.canonical.modes import ambient
from kvt_compile.passes.decide import keys_kept
from kvt_compile.passes.pipeline import PassResult, run_passes, unmet
from kvt_compile.passes.site import Where
from kvt_compile.report.facts import GraphReport, RefusalReport, SiteReport, location_of
from kvt_compile.report.graphs import GraphRecorder
from kvt_compile.report.kernel_spec import lowering_of, spec_of
from kvt_compile.report.report import Report


def explain(model: nn.Module | fx.GraphModule | ExportedProgram, *example_inputs: Any, **keywords: Any) -> Report:
    """Reports every attention of a model, what would become of it, and every softmax that would be left alone.

    The model is captured by torch.compile as it would be in use, graph breaks included, and run twice, the second time
    to see what runs outside of every graph.  Parameters, buffers and random state are as before
    afterwards.

    Args:
        model: an `nn.Module`, a graph module, or an `ExportedProgram`.
        example_inputs: inputs of the model.
        keywords: options of `kvt_compile.config.Options`; every other keyword is an input of the model.

    Raises OptionError for an option with a value it cannot have, or a pattern that matches no site.
    """
    options = make_options({name: value for name, value in keywords.items() if name in NAMES})
    kwargs = {name: value for name, value in keywords.items() if name not in NAMES}
    recorder = GraphRecorder()
    hidden: list[tuple[str, Where]] = []
    runs: list[int] = []
    if isinstance(model, fx.GraphModule | ExportedProgram):
        with LOCK:
            captured = capture(model, example_inputs, kwargs)
            origins = captured.origins
            results = [run_passes(captured.graph, options.policy, origins=origins, apply=False, watch=recorder)]
    else:
        results, runs = _through_dynamo(model, example_inputs, kwargs, options, recorder)
        hidden = calls_outside(model, example_inputs, kwargs, results)
    if wrong := unmet(options.policy, results):
        raise OptionError(wrong)
    report = build_report(results, options, recorder.finish(options.lowering, options.topk_tolerance), runs)
    outside = (RefusalReport(name, where.module, location_of(where), _OUTSIDE, "capture") for name, where in hidden)
    return replace(report, refusals=(*report.refusals, *outside))


_OUTSIDE = "it runs outside every captured graph: a graph break hides it (TORCH_LOGS=graph_breaks says which)"


def _through_dynamo(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, recorder: GraphRecorder
) -> tuple[list[PassResult], list[int]]:
    """What the passes say of every graph, and how often each ran."""
    results: list[PassResult] = []
    runs: list[int] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        number = recorder.graph = len(results)
        result = run_passes(gm, options.policy, lowering=options.lowering, apply=False, watch=recorder, entry=ambient())
        results.append(result)
        runs.append(0)

        def forward(*inputs: Any) -> Any:
            runs[number] += 1
            return gm.forward(*inputs)

        return forward

    run_through_dynamo(model, args, kwargs, record)
    return results, runs


def build_report(
    results: Iterable[PassResult],
    options: Options,
    graphs: tuple[GraphReport, ...] = (),
    runs: Sequence[int] = (),
) -> Report:
    """One report of all captured graphs; `runs`: how often each of them ran, where that is known."""
    sites: list[SiteReport] = []
    refusals: list[RefusalReport] = []
    for number, result in enumerate(results):
        for decision in result.decisions:
            topk = decision.topk
            if isinstance(topk, int | float) and isinstance(decision.site.keys, int):
                topk = keys_kept(topk, decision.site.keys)
            shown = f"{topk:g} of {decision.site.keys}" if isinstance(topk, float) else topk
            if shown is not None and not isinstance(shown, int):
                shown = str(shown)
            sites.append(
                SiteReport.of(
                    decision.site,
                    topk=shown,
                    reason=decision.reason,
                    own=decision.own,
                    select=decision.select,
                    lowering="" if topk is None else lowering_of(decision.site, options.lowering, decision.select),
                    spec=None if topk is None else spec_of(decision.site, decision.select),
                    graph=number,
                    runs=runs[number] if runs else 1,
                )
            )
        refusals += [RefusalReport.of(refusal, graph=number) for refusal in result.refusals]
    return Report(tuple(sites), tuple(refusals), graphs)
