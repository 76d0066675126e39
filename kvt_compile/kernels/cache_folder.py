"""Environment -> the folder that everything kept on disk lives in: built C kernels (`c/`), tuning results (`tune/`).

KVT_CACHE_DIR      the folder (default: $XDG_CACHE_HOME/kvt_compile, ~/.cache/kvt_compile)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvt_compile.kernels.warn import warn_once


def cache_folder() -> Path:
    """As the environment has it now, absolute; it need not exist.  Where it says nothing usable (no home directory,
    `~nosuchuser`): one folder of the user's among the temporary ones, and a warning."""
    own, base = os.environ.get("KVT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        if base and Path(base).is_absolute():
            return Path(base) / "kvt_compile"
        return Path("~/.cache").expanduser().absolute() / "kvt_compile"
    except (RuntimeError, OSError) as error:
        folder = _temporary() / f"kvt_compile-{os.geteuid()}"
        warn_once(
            f"kvt_compile finds no folder for its cache ({error}) and keeps it in {folder}; "
            "set KVT_CACHE_DIR to a folder of your own"
        )
        return folder


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none can be written, and so neither can this one
        return Path("/tmp")
