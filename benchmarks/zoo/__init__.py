"""The zoo: real models -> what the finder makes of every attention in them, and whether the meaning is kept.

    python -m benchmarks.zoo                     the whole zoo (about an hour on one core)
    python -m benchmarks.zoo --only 'timm/swin*' some of it

catalogue (what is true of each model) -> models (build it) -> judge (find, rewrite, compare) -> run (one process
each) -> table (for people, JSON, docs/zoo.md)
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path.append(str(ROOT / "examples"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchvision_cpu  # noqa: F401 - before anything imports torchvision: lets it import beside a CPU-only torch
