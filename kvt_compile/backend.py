"""`torch.compile(model, backend="kvt")`: Dynamo graph -> passes -> Inductor.

Registered through the entry point group `torch_dynamo_backends`, so users import nothing of ours.  The passes run
before AOTAutograd: the ops bring their own backward, and Inductor compiles everything around them as always.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from kvt_compile.config import Options, split_options
from kvt_compile.kernels import tune
from kvt_compile.passes.canonical.modes import ambient
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.report import graphs
from kvt_compile.report.graphs import GraphRecorder
from kvt_compile.report.kernel_spec import spec_of

log = logging.getLogger("kvt_compile")


class RefusalError(RuntimeError):
    """With `on_refusal="error"`: a softmax or SDPA call was left as it is."""


def kvt_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend "kvt".

    Args:
        gm: the captured graph; rewritten in place.
        example_inputs: fake or real inputs, as Dynamo passes them.
        mode: one of Inductor's modes ("default", "reduce-overhead", "max-autotune", ...).
        options: options of `kvt_compile.config.Options`, and any of Inductor's own.

    Returns a callable that runs the compiled graph.
    Raises OptionError for an unknown option and RefusalError as `on_refusal` asks.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, inductor = split_options(options)
    recorder = GraphRecorder() if graphs.log.isEnabledFor(logging.DEBUG) else None
    result = run_passes(
        gm, ours.policy, lowering=ours.lowering, tolerance=ours.topk_tolerance, watch=recorder, entry=ambient()
    )
    if recorder is not None:
        graphs.log_changes(recorder.finish())
    report_refusals(result, ours)
    request_tuning(result, ours)
    patches = {**(list_mode_options(mode) if mode else {}), **inductor}
    with _autocast_in_cache_key():
        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches or None)
    run: Callable[..., Any] = compiled
    return run


def request_tuning(result: PassResult, options: Options) -> None:
    """Tells the autotuner what was asked for the kernels of every rewritten site.

    It changes no result, so it is no argument of the ops: it belongs to the kernel, which all models of a process that
    compute the same thing share, and whoever compiled last decides."""
    for decision in result.decisions:
        if decision.topk is not None and (spec := spec_of(decision.site)) is not None:
            tune.request(spec, options.autotune)


def report_refusals(result: PassResult, options: Options) -> None:
    """Logs what was found and tells about refusals as the user asked.  Raises RefusalError if that is "error"."""
    rewritten = sum(decision.topk is not None for decision in result.decisions)
    log.info("%d attention sites, %d rewritten, %d refused", len(result.decisions), rewritten, len(result.refusals))
    if options.on_refusal == "ignore" or not result.refusals:
        return
    lines = [f"{r.node.name} in {r.where}: {r.reason}" for r in result.refusals]
    text = "kvt left these as they are:\n  " + "\n  ".join(lines)
    if options.on_refusal == "error":
        raise RefusalError(text)
    warnings.warn(text, stacklevel=3)


@contextmanager
def _autocast_in_cache_key() -> Iterator[None]:
    """torch <= 2.12 forgets the autocast dtype in the key of its compile cache; the tag is part of that key."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    tag = ",".join(f"{d}:{torch.get_autocast_dtype(d)}" for d in devices)
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}|kvt-autocast={tag}"):
        yield
