"""What runs -> how long it takes here: attentions under every choice, and the model as a whole.

    an attention   the site's own kernel on the tensors of the sample; with every key, torch's dense attention on them
    the model      its captured graph, untouched and with a policy, in turns

The shortest of several runs counts: what else the machine does only ever adds.  Dense attention is timed without the
model's mask or bias, which it would be slower with: a choice is never called faster than dense when it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvt_compile.calibration.candidates import looks_back
from kvt_compile.calibration.choose import Choice
from kvt_compile.calibration.data import Batch
from kvt_compile.calibration.facts import Speed
from kvt_compile.calibration.measure import Curve, Name, Runner, Step, numbered, under
from kvt_compile.capture.capture import CaptureError
from kvt_compile.observe import AttentionCall, SiteCall
from kvt_compile.rewrite import rewrite

ROUNDS, LEAST = 7, 3
SECONDS = 1.0
"""After the least rounds no further one begins after so long."""

Run = Callable[[], object]


def fastest(runs: Sequence[Run], device: torch.device) -> list[float]:
    """Seconds of each, taking turns, after one round that is not counted."""
    best = [float("inf")] * len(runs)
    begin = time.perf_counter()
    for round_ in range(ROUNDS + 1):
        for n, run in enumerate(runs):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if round_:
                best[n] = min(best[n], time.perf_counter() - start)
        if round_ >= LEAST and time.perf_counter() - begin > SECONDS:
            break
    return best


def times(run: Runner, batch: Batch, curves: Sequence[Curve], step: Step) -> dict[Name, tuple[float, ...]]:
    """Seconds of every attention under each of its choices, for one batch; attentions of one kind are timed once."""
    choices = {(curve.path, curve.number): curve.choices for curve in curves}
    found: dict[Name, tuple[float, ...]] = {}
    known: dict[Any, tuple[float, ...]] = {}

    def look(call: SiteCall, name: Name) -> Tensor | None:
        if name not in choices:
            return None
        kind = (*_kind(call), choices[name])
        if kind not in known:
            known[kind] = seconds(call, choices[name])
        found[name] = known[kind]
        step()
        return under(call, 1.0).output()

    run(batch, numbered(look))
    return found


def seconds(call: SiteCall, choices: Sequence[Choice]) -> tuple[float, ...]:
    """Of one attention under each choice."""
    runs: list[Run] = []
    for choice in choices:
        runs.append(_dense(call) if choice == 1.0 and isinstance(call, AttentionCall) else under(call, choice).output)
    device = call.q.device if isinstance(call, AttentionCall) else torch.device("cpu")
    return tuple(fastest(runs, device))


def _dense(call: AttentionCall) -> Run:
    q, k, v = call.q, call.k, call.v.to(call.q.dtype)
    causal, groups = looks_back(call.score), call.q.shape[1] != call.k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups)


def _kind(call: SiteCall) -> tuple[Any, ...]:
    if not isinstance(call, AttentionCall):
        return (call.number,)
    tensors = (call.q, call.k, call.v, *call.captured)
    shapes = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
    return shapes, call.score, call.weight, call.grid and tuple(call.grid), call.prefix


def speed(run: Runner, policy: Mapping[str, str | None], saved: float, batch: Batch) -> Speed | None:
    """Of the whole model, dense and with a policy; None where it cannot be captured as one graph."""

    def captured(**keep: Any) -> nn.Module:
        return rewrite(run.model, *batch.args, example_kwargs=batch.kwargs, **run.options, **keep).module

    try:
        modules = captured(topk=None), captured(select=policy)
    except CaptureError:
        return None
    device = next((x.device for x in batch.args if isinstance(x, Tensor)), torch.device("cpu"))
    runs: list[Run] = [lambda module=module: module(*batch.args, **batch.kwargs) for module in modules]  # type: ignore[misc]
    dense, ours = fastest(runs, device)
    return Speed(batch.size, torch.get_num_threads(), str(device), dense, saved, ours)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
