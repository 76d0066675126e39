"""What torch.compile was asked, remembered so that another question is another compilation.

    options={"topk": 1}      and   {"topk": 1.0}                    one key, and all of them: equal as dicts
    {"a.*": 4, "*": 8}       and   {"*": 8, "a.*": 4}               the first match wins: equal as dicts
    options["topk"] = 4                                             the very dict that something was compiled with

Dynamo runs for a model what it compiled of its code before, where the options are equal as Python compares them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any


class Asked(dict[str, Any]):
    """Options as they were when something was compiled, equal only to those that ask the same."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({name: _kept(value) for name, value in options.items()})
        self._written = _written(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict.__eq__(self, dict(other)) and self._written == _written(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def remember(options: Mapping[str, Any] | None) -> None:
    """Has the call of torch.compile that is compiling keep the options as they are now."""
    if options is None or isinstance(options, Asked):
        return
    with contextlib.suppress(Exception):  # no public name tells of it; without it options compare as dicts do
        from torch._dynamo.eval_frame import innermost_backend
        from torch._dynamo.symbolic_convert import InstructionTranslator

        asking: Any = innermost_backend(InstructionTranslator.current_tx().output.compiler_fn)  # type: ignore[arg-type]
        if asking.kwargs.get("options") is options:
            asking.kwargs = {**asking.kwargs, "options": Asked(options)}


def _kept(value: Any) -> Any:
    """A copy of what a user may write to later."""
    if isinstance(value, dict):
        return {name: _kept(x) for name, x in value.items()}
    return [*map(_kept, value)] if isinstance(value, list) else value


def _written(options: Mapping[str, Any]) -> dict[str, str]:
    """1 and 1.0, and mappings in another order, are equal and written differently."""
    return {name: repr(_kept(value)) for name, value in options.items()}
