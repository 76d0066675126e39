"""Runs -> milliseconds: warm, taking turns, medians.

Contestants take turns so that whatever slows the machine meanwhile slows all of them.  The clock is an argument: events
on a GPU, wall time on a CPU, a list of numbers in a test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """What times one run."""

    def now(self) -> float:
        """Seconds since some moment: for budgets."""

    def milliseconds(self, run: Run) -> float:
        """How long one call of `run` takes."""


class WallClock:
    """For work that is done when the call returns."""

    def now(self) -> float:
        return time.perf_counter()

    def milliseconds(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)


class DeviceClock(WallClock):
    """Events around the work on a CUDA device, with a cold second-level cache.

    Before every run a buffer of twice that cache is written, often enough to keep the device busy for `lead_ms`: in
    that time the host queues the run and both events, so that its own work is not in the measurement.
    """

    def __init__(self, device: torch.device, lead_ms: float = 0.2) -> None:
        self.device = device
        cache: int = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._buffer = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device=device)
        self._fills = 1
        fill_ms = statistics.median(self.milliseconds(self._buffer.zero_) for _ in range(5))
        self._fills = max(1, round(lead_ms / max(fill_ms, 1e-3)))

    def milliseconds(self, run: Run) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self._fills):
                self._buffer.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))


def take_turns(
    runs: Sequence[Run], clock: Clock, seconds: float, at_least: int = 5, at_most: int = 1000
) -> list[list[float]]:
    """Milliseconds of every turn of every run, until `seconds` have passed; at least and at most so many turns."""
    times: list[list[float]] = [[] for _ in runs]
    start = clock.now()
    while runs and len(times[0]) < at_most and (len(times[0]) < at_least or clock.now() - start < seconds):
        for run, kept in zip(runs, times, strict=True):
            kept.append(clock.milliseconds(run))
    return times


def medians(runs: Sequence[Run], clock: Clock, seconds: float, at_least: int = 5, at_most: int = 1000) -> list[float]:
    """Median milliseconds of every run; each is called once before, to be warm."""
    for run in runs:
        run()
    return [statistics.median(x) for x in take_turns(runs, clock, seconds, at_least, at_most)]
