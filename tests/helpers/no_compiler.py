"""A machine without a compiler: calls that ask for "auto" run as torch operations, and build no kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvt_compile.kernels.op import lowerings


class _Missing:
    """The C lowering there."""

    def __init__(self, lowering: Any) -> None:
        self._lowering = lowering

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowering, name)

    def supports(self, spec: Any) -> str:
        return "there is no compiler"


@contextmanager
def without_compiler() -> Iterator[None]:
    """Here, on this rank."""
    undo = lowerings.register("c", _Missing(lowerings.get("c")))
    try:
        yield
    finally:
        undo()
