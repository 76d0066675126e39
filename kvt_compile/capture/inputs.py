"""A graph of Dynamo -> what the model calls each of its inputs, in the placeholders' meta.

L['x']                  forward(self, x)                  x
L['args'][0]            a wrapper's *args around it       x
L['kwargs']['mask']     the same for keywords             mask
L['x'] after a break    x may have been assigned anew     none of the model's inputs
L['self'].table         no argument                       none of the model's inputs
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import fx, nn

from kvt_compile.capture.frames import compiled_code, first_argument, is_entered
from kvt_compile.capture.traceless import is_call_of_its_own
from kvt_compile.passes.canonical.inputs import INPUT

_WRAPPED = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
_LOCAL = re.compile(r"L\['(\w+)'\](.*)", re.DOTALL)
_ITEM = re.compile(r"\[(?:'([^']*)'|(\d+))\](.*)", re.DOTALL)


def note_inputs(gm: fx.GraphModule) -> None:
    """Writes the name of each input of a graph that Dynamo just captured; an empty one where it is not the model's."""
    code = compiled_code()
    if code is None:
        return  # no graph of Dynamo, or none that says where it is from: placeholders keep their names
    name = _namer(code)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and (argument := node.meta.get("grapharg")) is not None:
            source = getattr(argument.source, "name", "")
            node.meta[INPUT] = name(str(source() if callable(source) else source))


def _namer(code: CodeType) -> Callable[[str], str]:
    """What turns a source of the frame with this code into a name."""
    model = first_argument()
    if code.co_name.startswith("torch_dynamo_resume_in"):
        return lambda source: ""
    if not isinstance(model, nn.Module):
        return _of_function if is_entered(None) else lambda source: ""
    codes = _codes(model.forward)
    known = code in (*codes, *_WRAPPED) or is_call_of_its_own(code)
    if not known or not is_entered(model):
        return lambda source: ""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return lambda source: ""
    own = code.co_varnames[0]
    passed_on = code is not codes[-1] if codes else True
    return lambda source: _of_model(source, own, parameters, passed_on)


def _codes(forward: Any) -> list[CodeType]:
    """The code of a function and of those it wraps, the innermost last."""
    found = []
    while forward is not None:
        if isinstance(code := getattr(forward, "__code__", None), CodeType):
            found.append(code)
        forward = getattr(forward, "__wrapped__", None)
    return found


def _of_function(source: str) -> str:
    local = _LOCAL.fullmatch(source)
    return "".join(local.groups()) if local else ""


def _of_model(source: str, own: str, parameters: list[inspect.Parameter], passed_on: bool) -> str:
    """passed_on: the frame takes `*args, **kwargs`, or `args, kwargs`, for the model."""
    local = _LOCAL.fullmatch(source)
    if local is None or local[1] == own:
        return ""
    name, rest = local.groups()
    item = _ITEM.fullmatch(rest)
    if not passed_on:
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        of_keywords = kinds.get(name) is inspect.Parameter.VAR_KEYWORD and item is not None and item[1] is not None
        return f"{item[1]}{item[3]}" if of_keywords and item else name + rest
    if item is None:
        return ""
    key, number, rest = item.groups()
    if key is not None:
        return f"{key}{rest}"
    for at, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return f"{parameter.name}[{int(number) - at}]{rest}"
        if at == int(number):
            return f"{parameter.name}{rest}"
    return ""
