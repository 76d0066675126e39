"""What a person should know once: a model calls the same kernel in every layer."""

from __future__ import annotations

import warnings
from functools import lru_cache


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """One RuntimeWarning per process and message."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)
