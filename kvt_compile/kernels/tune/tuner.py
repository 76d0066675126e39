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
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar

import torch

from kvt_compile.kernels.cache_folder import cache_folder
from kvt_compile.kernels.tune.entry import Dropped, Entry, Measured
from kvt_compile.kernels.tune.key import Key
from kvt_compile.kernels.tune.lock import locked
from kvt_compile.kernels.tune.mode import Mode
from kvt_compile.kernels.tune.progress import LogProgress, Progress, Step
from kvt_compile.kernels.tune.store import Store
from kvt_compile.kernels.tune.timing import Clock, DeviceClock, Run, take_turns
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


class Unfit(Exception):  # noqa: N818 - an outcome of a run, not an error
    """Raised by `run` for a candidate that is not worth timing; the text says why ("spills 12 registers")."""


@dataclass(frozen=True)
class Effort:
    """How much time a key may take."""

    wait_s: float = 120.0
    """For another process that measures."""
    seconds: float = 2.0
    """For measuring the best candidates against each other, compilation not counted."""
    first_turns: int = 3
    """After these, candidates slower than `margin` times the best drop out."""
    margin: float = 1.25
    finalists: int = 6
    turns: int = 7
    """Of each finalist, at least."""


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
            return self._measure(key, candidates, default, run, clock)

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
    ) -> C:
        make_clock = make_clock or DeviceClock(torch.device("cuda", torch.cuda.current_device()))
        clock = make_clock() if callable(make_clock) else make_clock
        contestants = list(dict.fromkeys((default, *(candidates() if callable(candidates) else candidates))))
        ready: list[tuple[C, Run]] = []
        dropped: list[Dropped] = []
        for done, candidate in enumerate(contestants):
            self.progress(Step(key, done, len(contestants), candidate=candidate.to_dict()))
            try:
                runner = run(candidate)
                clock.milliseconds(runner)  # compiles; what fails, fails here
                ready.append((candidate, runner))
            except Exception as error:
                dropped.append(Dropped(candidate.to_dict(), _reason(error)))
                log.debug("dropped %s: %s", candidate, dropped[-1].reason)
        self.progress(Step(key, len(contestants), len(contestants)))
        if not ready:
            self._given_up.add(key)
            log.warning(
                "none of %d block sizes for the %s kernel of %s could be timed, the default stays; the first failed "
                "with: %s", len(contestants), key.part, key.shape, dropped[0].reason,
            )  # fmt: skip
            return default
        try:
            times = self._race([runner for _, runner in ready], clock)
        except Exception as error:
            self._given_up.add(key)
            log.warning("timing the %s kernel of %s failed, the default stays: %s", key.part, key.shape, _reason(error))
            return default
        order = sorted(range(len(ready)), key=times.__getitem__)
        winner = ready[order[0]][0]
        measured = tuple(Measured(ready[n][0].to_dict(), round(times[n], 6)) for n in order)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self._keep(Entry(key, winner.to_dict(), measured, tuple(dropped), today))
        self._known[key, type(default)] = winner
        self.progress(
            Step(key, len(contestants), len(contestants), winner=winner.to_dict(), milliseconds=times[order[0]])
        )
        return winner

    def _race(self, runs: Sequence[Run], clock: Clock) -> list[float]:
        """Medians: few turns of all, then more of those that are near the best."""
        effort = self.effort
        turns = take_turns(runs, clock, 0.0, effort.first_turns, effort.first_turns)
        first = [statistics.median(x) for x in turns]
        near = sorted((n for n, x in enumerate(first) if x <= effort.margin * min(first)), key=first.__getitem__)
        finalists = near[: effort.finalists]
        if len(finalists) > 1:
            more = take_turns([runs[n] for n in finalists], clock, effort.seconds, effort.turns)
            for n, times in zip(finalists, more, strict=True):
                turns[n] += times
        result = [statistics.median(x) for x in turns]
        # who dropped out lost, whatever the finalists' later turns were slowed by
        worst = max(result[n] for n in finalists)
        return [x if n in finalists else max(x, worst) for n, x in enumerate(result)]

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
) -> C:
    """`Tuner.pick` of this process's tuner."""
    return process_tuner().pick(key, candidates, default, run, mode, clock)


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Shows this process's tuning to `progress` instead of the log, in every thread."""
    tuner = process_tuner()
    before, tuner.progress = tuner.progress, progress
    try:
        yield
    finally:
        tuner.progress = before


def _reason(error: BaseException) -> str:
    """One line: `OutOfResources: shared memory`, or an Unfit's own text."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, Unfit) else f"{type(error).__name__}: {text}" if text else type(error).__name__
