"""`torch.compile(model, backend="kvt")`: Dynamo graph -> passes -> Inductor, or another backend (`then`).

Registered through the entry point group `torch_dynamo_backends`, so users import nothing of ours.  The passes run
before AOTAutograd: the ops bring their own backward, and Inductor compiles everything around them as always.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx

from kvt_compile import torch_versions
from kvt_compile.capture.frames import guard_paths, note_paths
from kvt_compile.capture.held import note_held, uncached
from kvt_compile.capture.inputs import note_inputs
from kvt_compile.capture.options import remember
from kvt_compile.capture.skipped import tell_if_disabled, tell_of_transforms
from kvt_compile.config import OptionError, Options, split_options
from kvt_compile.kernels import lowerings, tune
from kvt_compile.kernels.warn import warn_once
from kvt_compile.passes.canonical.modes import ambient
from kvt_compile.passes.pipeline import PassResult, run_passes
from kvt_compile.report import graphs
from kvt_compile.report.graphs import GraphRecorder
from kvt_compile.report.kernel_spec import spec_of

log = logging.getLogger("kvt_compile")


class RefusalError(RuntimeError):
    """With `on_refusal="error"`: a softmax or SDPA call was left as it is."""


Backend = Callable[..., Callable[..., Any]]
"""(graph, example inputs) -> what runs the graph."""


def _backend(
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
    Raises OptionError for an unknown option, or one of Inductor's where another backend follows, and RefusalError as
    `on_refusal` asks.
    """
    if torch_versions.is_untried():
        warn_once(torch_versions.untried())
    remember(options)
    ours, inductor = split_options(options)
    if ours.then != "inductor" and mode is not None:
        raise OptionError(f"mode {mode!r} is Inductor's, and the graph goes to {ours.then!r}: leave one of them out")
    with in_cache_keys(apply_passes(gm, ours)):
        if ours.then == "inductor":
            return by_inductor(gm, example_inputs, mode=mode, options=inductor)
        return backend_of(ours.then)(gm, example_inputs)


_backend.__name__ = "kvt_backend"
_asked = False


def __getattr__(name: str) -> Any:
    """`kvt_backend`, which `torch.compile(backend="kvt")` takes from here: the one sign that somebody asked for it."""
    global _asked
    if name != "kvt_backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _asked:
        _asked = True
        tell_if_disabled()
        tell_of_transforms(_backend)
    return _backend


def apply_passes(gm: fx.GraphModule, options: Options) -> PassResult:
    """Rewrites in place a graph that will run in the modes this thread is in; logs and tells as the options ask.

    Raises RefusalError as `on_refusal` asks."""
    recorder = GraphRecorder() if graphs.log.isEnabledFor(logging.DEBUG) else None
    note_paths(gm)
    note_inputs(gm)
    inside = lowerings.inside()
    result = run_passes(
        gm,
        options.policy,
        lowering=asked_lowering(options),
        tolerance=options.topk_tolerance,
        watch=recorder,
        entry=ambient(),
        ranks=inside.ranks,
    )
    check_all_rewritten(result, inside)
    if recorder is not None:
        graphs.log_changes(recorder.finish())
    guard_paths(options.policy, result.decisions)
    note_held(gm)
    report_refusals(result, options)
    request_tuning(result, options)
    return result


def by_inductor(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Inductor, with a mode and options as `torch.compile` takes them."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from kvt_compile.kernels.direct import writing, written  # it registers the operators, which Inductor will meet

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    cpp = patches.get("cpp_wrapper", config.cpp_wrapper)
    with _cpp() if cpp else written():
        inner = compile_fx_inner if cpp else writing(compile_fx_inner)
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches or None)
    run: Callable[..., Any] = compiled
    return run


def _cpp() -> AbstractContextManager[None]:
    """In here C++ that Inductor writes calls kernels themselves, and no operator of Python."""
    from kvt_compile.kernels.inside import kernels_inside  # for those who ask for C++ alone: it loads both generators

    return kernels_inside(tell=False)


def backend_of(then: str | Backend) -> Backend:
    """A backend, by its name where it is not one itself.  Raises what its import raises."""
    if then == "inductor":
        return by_inductor
    found: Backend = torch._dynamo.lookup_backend(then)
    return found


def asked_lowering(options: Options) -> str:
    """The lowering that new nodes ask for here.  Raises OptionError for one that has no place here."""
    inside = lowerings.inside()
    if inside.lowering != "auto" and options.lowering != "auto":
        raise OptionError(
            f"lowering is {options.lowering!r} inside of context_parallel, expected 'auto': which lowering computes a "
            "rank's part is decided there"
        )
    return inside.lowering if options.lowering == "auto" else options.lowering


def check_all_rewritten(result: PassResult, inside: lowerings.Inside) -> None:
    """Raises RefusalError where keys are cut over several ranks and attention would be over those of one."""
    if inside.ranks == 1:
        return
    left = [f"{r.node.name} in {r.where}: {r.reason}" for r in result.refusals]
    for decision in result.decisions:
        if decision.topk is None:
            left.append(f"attention in {decision.site.where}: {decision.reason}")
        elif decision.site.tier != "fused":
            left.append(
                f"attention in {decision.site.where}: its weights are used besides ({decision.site.tier_reason})"
            )
    if left:
        raise RefusalError(
            "inside of context_parallel these would attend to this rank's own keys only; move them outside of it, or "
            "write them so that they are rewritten:\n  " + "\n  ".join(left)
        )


def request_tuning(result: PassResult, options: Options) -> None:
    """Tells the autotuner what was asked for the kernels of every rewritten site.

    It changes no result, so it is no argument of the ops: it belongs to the kernel, which all models of a process that
    compute the same thing share, and whoever compiled last decides."""
    for decision in result.decisions:
        if decision.topk is not None and (spec := spec_of(decision.site, decision.select)) is not None:
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
def in_cache_keys(result: PassResult) -> Iterator[None]:
    """While this is open, torch's compile caches serve nothing that was compiled of another graph.

    torch <= 2.12 forgets the autocast dtype in the key; the tag is part of that key."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    tag = ",".join(f"{d}:{torch.get_autocast_dtype(d)}" for d in devices)
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}|kvt-autocast={tag}"), uncached(result):
        yield
