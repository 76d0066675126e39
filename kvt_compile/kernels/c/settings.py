"""Environment -> settings of the C lowering.  The one place of `kernels/c` that reads the environment.

KVT_CACHE_DIR      folder of built kernels (see `kernels/cache_folder.py`)
CC                 C compiler (default: the first of cc, gcc, clang on the PATH)
KVT_CPU            "native" (default) or an instruction set of `toolchain.TARGETS`
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvt_compile.kernels.cache_folder import cache_folder


@dataclass(frozen=True)
class Settings:
    """What the user may choose about building kernels."""

    cache: Path
    compiler: str | None = None
    """A command as in CC; None: search the PATH."""
    target: str = "native"


def from_environment() -> Settings:
    """Settings as the environment has them now."""
    return Settings(cache_folder(), os.environ.get("CC") or None, os.environ.get("KVT_CPU") or "native")
