"""What a person should know once: a model calls the same kernel in every layer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable

log = logging.getLogger(__name__)


class WarnOnce:
    """One RuntimeWarning per process and subject, which is the message where none is given; the rest is logged."""

    def __init__(self) -> None:
        self._told: set[Hashable] = set()

    def __call__(self, message: str, about: Hashable = None) -> None:
        subject = message if about is None else about
        if subject in self._told:
            log.debug(message)
            return
        self._told.add(subject)  # first, as a filter may turn the warning into an exception
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def cache_clear(self) -> None:
        """Nothing has been told."""
        self._told.clear()


warn_once = WarnOnce()
