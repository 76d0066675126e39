"""Environment -> the folder that everything kept on disk lives in: built C kernels (`c/`), tuning results (`tune/`).

KVT_CACHE_DIR      the folder (default: $XDG_CACHE_HOME/kvt_compile, ~/.cache/kvt_compile)
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """As the environment has it now; it need not exist."""
    own, base = os.environ.get("KVT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "kvt_compile"
