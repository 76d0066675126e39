"""The same operators under torch.distributed: one call of an operator on DTensors -> calls on the shards of each rank.

    when_imported   torch.distributed.tensor is imported  ->  `rules` register themselves
    rules           an operator's arguments, DTensors     ->  placements, a local call, DTensors
    layout          placements as they are                ->  the cheapest ones that are exact
    coordinates     a text over b, h, i                   ->  the text of a shard, which knows where it lies
    context/        q, k, v cut along the sequence        ->  attention over the whole of it

Importing this package imports nothing of torch.distributed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvt_compile.parallel.context.captured import ContextParallelError
    from kvt_compile.parallel.context.context import Context, context_parallel

_PLACES = {"Context": "context", "ContextParallelError": "captured", "context_parallel": "context"}
__all__ = ["Context", "ContextParallelError", "context_parallel"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"kvt_compile.parallel.context.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
