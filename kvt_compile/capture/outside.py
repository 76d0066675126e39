"""Softmax and SDPA calls that no captured graph has: what a graph break hides from torch.compile.

The model runs eagerly under a function mode that notes the line and the module of each call; a line that no graph has a
softmax of, for that module, is outside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn

from kvt_compile.capture.frames import OWN, method_of
from kvt_compile.capture.unchanged import unchanged
from kvt_compile.capture.watching import Watching
from kvt_compile.passes.canonical.spellings import canonical_name
from kvt_compile.passes.finding.describe import in_torch
from kvt_compile.passes.pipeline import PassResult
from kvt_compile.passes.site import Where

Line = tuple[str, int]
"""File and number; empty and 0 where there is none."""
_ATTENTION = (
    "softmax", "softmin", "scaled_dot_product_attention", "multi_head_attention_forward",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
)  # fmt: skip
"""What attention is called, composites that dispatch themselves included: nothing in them is seen."""


def calls_outside(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], results: Iterable[PassResult]
) -> list[tuple[str, Where]]:
    """(function, place) of every softmax and SDPA call the model makes on a line that no graph has one of, for the
    module it is called in.

    Args:
        results: what the passes said about each graph of the model.
    """
    seen = [where for result in results for where in _places(result)]
    calls = _Calls(model)
    with unchanged(model), torch.no_grad(), calls:
        model(*args, **kwargs)
    outside = {call: line for call, line in calls.made.items() if not any(_same(call[1], other) for other in seen)}
    return list(_without_lines(outside, seen))


def _without_lines(calls: Mapping[tuple[str, Where], Line], seen: list[Where]) -> Iterator[tuple[str, Where]]:
    """The calls that are none of the places whose line Dynamo does not note: of code that is in no file (`python -c`)
    it has the line in a file that calls it, if any.  Each place is one call; which calls are left cannot be told there,
    only how many."""
    left = list(seen)
    for (name, where), line in calls.items():
        lines = ("", 0), line
        alike = [other for other in seen if (other.file, other.line) in lines and _same_module(where, other)]
        if (where.file, where.line) == line:
            alike = []
        place = next((other for other in left if other in alike), None)
        if place is None:
            yield name, replace(where, file=line[0], line=line[1]) if alike else where
        else:
            left.remove(place)


def _places(result: PassResult) -> list[Where]:
    return [decision.site.where for decision in result.decisions] + [refusal.where for refusal in result.refusals]


def _same(call: Where, seen: Where) -> bool:
    """Whether a call is one that a graph has: a softmax may be a module of its own in the module that calls it, and a
    model of torch's modules alone has no line."""
    at_the_line = not call.file or (call.file, call.line) == (seen.file, seen.line)
    return at_the_line and _same_module(call, seen)


def _same_module(call: Where, seen: Where) -> bool:
    paths = ((f"{a}.", f"{b}.") for a in call.names for b in seen.names if a and b)
    return not (call.module and seen.module) or any(a.startswith(b) or b.startswith(a) for a, b in paths)


class _Calls(Watching):
    """Notes what is called, from where; each line once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.made: dict[tuple[str, Where], Line] = {}
        """What is called from where -> the innermost line of the model that is in a file."""
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = canonical_name(func)
        if name in _ATTENTION:
            where, line = self._caller(sys._getframe(1))
            self.made[name, where] = line
        return func(*args, **kwargs)

    def _caller(self, frame: FrameType | None) -> tuple[Where, Line]:
        """The model's own line and the module whose method it is in; the line again, or its caller's that is in a
        file."""
        file, line, module = "", 0, None
        in_file: Line | None = None
        while frame is not None and not (in_file and module is not None):
            inner = in_torch(frame.f_code.co_filename) or frame.f_code in _WATCHING
            if frame.f_code.co_filename.startswith(OWN) and not inner:
                break  # whoever runs the model to look at it
            if not file and not inner:
                file, line = frame.f_code.co_filename, frame.f_lineno
            if not in_file and not inner and os.path.isfile(frame.f_code.co_filename):
                in_file = frame.f_code.co_filename, frame.f_lineno
            if module is None and not inner and (owner := method_of(frame)) is not None:
                module = self._names.get(owner)
            frame = frame.f_back
        first, *others = module or [""]
        return Where(first, file, line, tuple(others)), in_file or ("", 0)


_WATCHING = (Watching.__torch_function__.__code__, _Calls.called.__code__)
