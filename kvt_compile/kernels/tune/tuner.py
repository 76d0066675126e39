"""Key + candidates -> the fastest candidate, from memory, from disk, or measured now.

    off      the default
    cached   memory -> the user's file -> the shipped file -> the default
    on       memory -> the user's file -> the shipped file -> measured now, stored

One process measures, the others wait for its result up to a bound and then go on with the default.  Nothing is measured
while a CUDA graph is captured.  Every failure ends in the default, never in an error: a tuner may cost speed only.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar

import torch

from kvt_compile.kernels.cache_folder import cache_folder
from kvt_compile.kernels.tune.entry import Dropped, Entry, Measured
from kvt_compile.kernels.tune.key import Key
from kvt_compile.kernels.tune.lock import locked
from kvt_compile.kernels.tune.mode import Mode
from kvt_compile.kernels.tune.progress import LogProgress, Progress, Step
from kvt_compile.kernels.tune.race import Apart, CannotMeasureError, Effort, Outcome, Tell, measure, reason_of
from kvt_compile.kernels.tune.store import Store
from kvt_compile.kernels.tune.timing import Clock, DeviceClock, Run
from kvt_compile.kernels.warn import warn_once

log = logging.getLogger("kvt_compile.tune")


class Candidate(Protocol):
    """Frozen, hashable, and a dictionary of JSON values and back."""

    def __hash__(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError for what is no candidate."""


C = TypeVar("C", bound=Candidate)
Candidates = Sequence[C] | Callable[[], Sequence[C]]


class Tuner:
    """The results of one process over one store."""

    def __init__(
        self,
        store: Store,
        *,
        progress: Progress | None = None,
        effort: Effort | None = None,
        capturing: Callable[[], bool] | None = None,
    ) -> None:
        self.store = store
        self.progress: Progress = progress or LogProgress()
        self.effort = effort or Effort()
        self._capturing = capturing or is_capturing
        self._known: dict[tuple[Key, type], Any] = {}
        self._missing: set[Key] = set()  # not on disk when it was looked up
        self._given_up: set[Key] = set()
        self._measuring = threading.RLock()

    def pick(
        self,
        key: Key,
        candidates: Candidates[C],
        default: C,
        run: Callable[[C], Run],
        mode: Mode = "cached",
        clock: Clock | Callable[[], Clock] | None = None,
        apart: Apart[C] | None = None,
    ) -> C:
        """The candidate to use now.

        Args:
            key: what the result holds for.
            candidates: what may win, or a function that lists it, called only to measure; the default competes whether
                it is among them or not.
            default: what is used where nothing is known.
            run: candidate -> a function that runs it once on data like the caller's.  It may raise, `Unfit` or anything
                else: the candidate is dropped and its reason kept with the result.
            mode: "off", "cached" or "on".
            clock: what times a run, or what makes one, called only to measure; None: events on the current CUDA device.
            apart: measures in another process, so that a candidate that faults takes nothing of this one along; `run`
                and `clock` are then used only where no such process can be had.
        """
        if mode == "off":
            return default
        kind = type(default)
        found: C | None = self._known.get((key, kind))
        if found is not None:
            return found
        if key not in self._missing:
            found = self._stored(key, kind)
            if found is not None:
                return found
        if mode == "cached" or key in self._given_up:
            return default
        if self._capturing():
            log.info("no tuning while a CUDA graph is captured: the default runs for %s", key.shape)
            return default
        with self._measuring, locked(self.store.lock(key), self.effort.wait_s, lambda: self._say_waiting(key)) as held:
            # another thread or process may have measured it while this one waited
            found = self._known.get((key, kind)) or self._stored(key, kind)
            if found is not None:
                return found
            if not held:
                self._given_up.add(key)
                log.warning(
                    "another process has been tuning for %.0f s; this one goes on with default block sizes for the %s "
                    "kernel of %s", self.effort.wait_s, key.part, key.shape,
                )  # fmt: skip
                return default
            return self._measure(key, candidates, default, run, clock, apart)

    def forget(self) -> None:
        """Everything this process remembers; files stay."""
        self._known.clear()
        self._missing.clear()
        self._given_up.clear()

    def _stored(self, key: Key, kind: type[C]) -> C | None:
        entry = self.store.load(key)
        if entry is not None:
            try:
                found = kind.from_dict(entry.winner)
            except (ValueError, TypeError) as error:
                warn_once(f"the tuning result {self.store.path(key)} has a winner that is none and is ignored: {error}")
            else:
                self._known[key, kind] = found
                return found
        self._missing.add(key)
        return None

    def _measure(
        self,
        key: Key,
        candidates: Candidates[C],
        default: C,
        run: Callable[[C], Run],
        make_clock: Clock | Callable[[], Clock] | None,
        apart: Apart[C] | None,
    ) -> C:
        contestants = list(dict.fromkeys((default, *(candidates() if callable(candidates) else candidates))))
        told = 0

        def tell(candidate: C) -> None:
            nonlocal told
            self.progress(Step(key, told, len(contestants), candidate=candidate.to_dict()))
            told += 1

        try:
            outcome = self._outcome(contestants, run, make_clock, apart, tell)
        except Exception as error:
            self._given_up.add(key)
            log.warning(
                "timing the %s kernel of %s failed, the default stays: %s", key.part, key.shape, reason_of(error)
            )
            return default
        self.progress(Step(key, len(contestants), len(contestants)))
        dropped = [Dropped(candidate.to_dict(), reason) for candidate, reason in outcome.dropped]
        if not outcome.times:
            self._given_up.add(key)
            log.warning(
                "none of %d block sizes for the %s kernel of %s could be timed, the default stays; the first failed "
                "with: %s", len(contestants), key.part, key.shape, dropped[0].reason,
            )  # fmt: skip
            return default
        order = sorted(outcome.times, key=lambda x: x[1])
        winner, milliseconds = order[0]
        measured = tuple(Measured(candidate.to_dict(), round(ms, 6)) for candidate, ms in order)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self._keep(Entry(key, winner.to_dict(), measured, tuple(dropped), today))
        self._known[key, type(default)] = winner
        self.progress(Step(key, len(contestants), len(contestants), winner=winner.to_dict(), milliseconds=milliseconds))
        return winner

    def _outcome(
        self,
        contestants: Sequence[C],
        run: Callable[[C], Run],
        make_clock: Clock | Callable[[], Clock] | None,
        apart: Apart[C] | None,
        tell: Tell[C],
    ) -> Outcome[C]:
        if apart is not None:
            try:
                return apart(contestants, self.effort, tell)
            except CannotMeasureError as error:
                log.warning("block sizes are measured in this process, where one that faults would end it: %s", error)
        make_clock = make_clock or DeviceClock(torch.device("cuda", torch.cuda.current_device()))
        return measure(contestants, run, make_clock() if callable(make_clock) else make_clock, self.effort, tell)

    def _keep(self, entry: Entry) -> None:
        try:
            self.store.save(entry)
        except OSError as error:
            warn_once(
                f"tuning results cannot be kept in {self.store.folder}: {error}. They hold for this process only; set "
                "KVT_CACHE_DIR to a folder that can be written"
            )

    def _say_waiting(self, key: Key) -> None:
        log.warning(
            "waiting up to %.0f s for another process that tunes kernels for %s", self.effort.wait_s, key.device
        )


def is_capturing() -> bool:
    """Whether the current CUDA stream records a graph, in which nothing may be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=1)
def process_tuner() -> Tuner:
    """The tuner of this process, over the user's cache folder."""
    return Tuner(Store(cache_folder() / "tune"))


def pick(
    key: Key,
    candidates: Candidates[C],
    default: C,
    run: Callable[[C], Run],
    mode: Mode = "cached",
    clock: Clock | Callable[[], Clock] | None = None,
    apart: Apart[C] | None = None,
) -> C:
    """`Tuner.pick` of this process's tuner."""
    return process_tuner().pick(key, candidates, default, run, mode, clock, apart)


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Shows this process's tuning to `progress` instead of the log, in every thread."""
    tuner = process_tuner()
    before, tuner.progress = tuner.progress, progress
    try:
        yield
    finally:
        tuner.progress = before
