"""A mode that sees what a model calls of torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """Every call goes to `called`, but those of a compilation that the model starts itself (`torch.cond` outside of one
    does): Dynamo would trace through the mode, and what it is for is no part of a graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **(kwargs or {}))
        return self.called(func, args, kwargs or {})

    @abstractmethod
    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes the call and returns its result."""
