"""`rewrite(model, *inputs)`: a model -> the same model with k-NN attention, to run, train, save and inspect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from kvt_compile.adjust import make_adjustable
from kvt_compile.backend import asked_lowering, check_all_rewritten, report_refusals, request_tuning
from kvt_compile.capture.capture import capture
from kvt_compile.capture.environment import LOCK
from kvt_compile.capture.modes import allow_modes, mode_of
from kvt_compile.capture.sizes import check_sizes
from kvt_compile.config import OptionError, make_options
from kvt_compile.explain import build_report
from kvt_compile.kernels import lowerings
from kvt_compile.passes.pipeline import run_passes, unmet
from kvt_compile.report.graphs import GraphRecorder
from kvt_compile.report.report import Report


@dataclass(frozen=True)
class RewriteResult:
    """What `rewrite` returns."""

    module: nn.Module
    """The rewritten model: same inputs, outputs and `state_dict` keys; parameters are shared with the original."""
    report: Report
    """What was found, rewritten, left dense and refused."""
    program: ExportedProgram | None = None
    """The rewritten program, when the model came as one or had to be captured by torch.export; None where a function
    decides which keys are kept (`given`), which a program cannot hold: `torch.export.export` takes the module."""


def rewrite(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> RewriteResult:
    """Rewrites every attention of a model into k-NN attention (KVT, arXiv 2106.00515).

    Args:
        model: an `nn.Module`, a graph of `torch.fx.symbolic_trace`, or an `ExportedProgram`.  It is not changed.
        example_inputs: inputs to read shapes from; the first dimension of each may differ later where it is at least 2
            here.  A call with other sizes is an error (ValueError of a traced model, torch's own of an exported one).
        example_kwargs: keyword inputs.
        options: any of `kvt_compile.config.Options` (topk, include, exclude, force_rewrite, lowering, on_refusal, ...).

    Raises OptionError, CaptureError (no single graph), RefusalError (with on_refusal="error").
    """
    chosen = make_options(options)
    with LOCK:
        captured = capture(model, example_inputs, example_kwargs or {})
        mode = mode_of(captured.graph.graph)
        recorder = GraphRecorder()
        result = run_passes(
            captured.graph,
            chosen.policy,
            lowering=asked_lowering(chosen),
            tolerance=chosen.topk_tolerance,
            origins=captured.origins,
            watch=recorder,
            ranks=lowerings.inside().ranks,
        )
    if wrong := unmet(chosen.policy, [result]):
        raise OptionError(wrong)
    check_all_rewritten(result, lowerings.inside())
    report_refusals(result, chosen)
    request_tuning(result, chosen)
    report = build_report([result], chosen, recorder.finish())
    program = captured.program
    module: nn.Module = captured.graph
    if program is not None:
        _keep_output_names(program)
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        allow_modes(module, mode)
    elif result.changed:
        rewritten = [decision.site.tier for decision in result.decisions if decision.topk is not None]
        check_sizes(captured.graph, fused="fused" in rewritten)
    assert isinstance(module, fx.GraphModule)
    _read_sizes_by_method(module)
    make_adjustable(module)
    return RewriteResult(module, report, None if result.has_functions else program)


def _read_sizes_by_method(module: fx.GraphModule) -> None:
    """x.size(0) instead of aten.sym_size(x, 0), which torch.func.vmap has no rule for."""
    sizes = module.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    for node in sizes:
        with module.graph.inserting_before(node):
            size = module.graph.call_method("size", node.args)
        size.meta = node.meta
        node.replace_all_uses_with(size)
        module.graph.erase_node(node)
    if sizes:
        module.recompile()


def _keep_output_names(program: ExportedProgram) -> None:
    """The signature names the graph's outputs; a rewritten output node has another name."""
    outputs = next(node for node in reversed(program.graph_module.graph.nodes) if node.op == "output")
    for spec, value in zip(program.graph_signature.output_specs, outputs.args[0], strict=True):
        if isinstance(value, fx.Node):
            spec.arg.name = value.name
