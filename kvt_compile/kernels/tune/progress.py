"""A tuning under way -> what a person sees: log lines, unless somebody else watches (`tuner.watching`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvt_compile.kernels.tune.key import Key

log = logging.getLogger("kvt_compile.tune")


@dataclass(frozen=True)
class Step:
    """One moment of tuning one key.  A watcher gets one for every candidate, and a last one with `winner`."""

    key: Key
    done: int
    """Candidates that were tried; `total` when only the last rounds of measuring remain."""
    total: int
    candidate: Mapping[str, Any] | None = None
    """The candidate that is compiled and tried now."""
    winner: Mapping[str, Any] | None = None
    milliseconds: float | None = None
    """The winner's."""


Progress = Callable[[Step], None]


@dataclass
class LogProgress:
    """Every step at level INFO; whoever waits longer than `patience_s` is told why, at level WARNING, which is shown
    where logging was never set up."""

    patience_s: float = 5.0
    now: Callable[[], float] = time.monotonic
    _told: dict[Key, float] = field(default_factory=dict)

    def __call__(self, step: Step) -> None:
        what = f"{step.key.part} kernel for {step.key.shape} on {step.key.device}"
        if step.winner is not None:
            log.info("tuned the %s: %s, %.3f ms", what, dict(step.winner), step.milliseconds)
            self._told.pop(step.key, None)
            return
        now = self.now()
        late = now - self._told.setdefault(step.key, now) > self.patience_s
        if late:
            self._told[step.key] = now
        log.log(
            logging.WARNING if late else logging.INFO,
            "tuning the %s: %d of %d block sizes tried",
            what, step.done, step.total,
        )  # fmt: skip
