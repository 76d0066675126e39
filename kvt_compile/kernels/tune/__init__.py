"""Kernel + GPU + shape -> the fastest of some candidates, measured once and kept on disk.  Knows nothing of Triton.

    key.py     what a result holds for    entry.py      a result                      timing.py    how long a run takes
    mode.py    what the user asked for    store.py      result <-> its own JSON file  lock.py      one process at a time
    tuner.py   the choice itself          transfer.py   results <-> one file          progress.py  what a person sees

A kernel's launcher calls `pick(Key.on(device, ...), candidates, default, run, requested(spec))`.
"""

from __future__ import annotations

from kvt_compile.kernels.tune.key import Key, ShapeClass, digest
from kvt_compile.kernels.tune.mode import Mode, request, requested
from kvt_compile.kernels.tune.race import Unfit
from kvt_compile.kernels.tune.tuner import Candidate, Tuner, pick, watching

__all__ = [
    "Candidate",
    "Key",
    "Mode",
    "ShapeClass",
    "Tuner",
    "Unfit",
    "digest",
    "pick",
    "request",
    "requested",
    "watching",
]
