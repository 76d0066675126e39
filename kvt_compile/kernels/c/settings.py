"""Environment -> settings of the C lowering.  The one place of `kernels/c` that reads the environment.

KVT_CACHE_DIR      folder of built kernels (default: $XDG_CACHE_HOME/kvt_compile, ~/.cache/kvt_compile)
CC                 C compiler (default: the first of cc, gcc, clang on the PATH)
KVT_CPU            "native" (default) or an instruction set of `toolchain.TARGETS`
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the user may choose about building kernels."""

    cache: Path
    compiler: str | None = None
    """A command as in CC; None: search the PATH."""
    target: str = "native"


def from_environment() -> Settings:
    """Settings as the environment has them now."""
    own, base = os.environ.get("KVT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        cache = Path(own).expanduser()
    else:
        cache = (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "kvt_compile"
    return Settings(cache, os.environ.get("CC") or None, os.environ.get("KVT_CPU") or "native")
