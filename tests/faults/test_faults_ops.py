"""Random valid and invalid calls of the operators through sanitized C, the short form; `op_fuzz.py` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

import op_fuzz
import pytest


def test_what_an_operator_accepts_is_memory_safe(tmp_path: Path) -> None:
    if op_fuzz.sanitizers() is None:
        pytest.skip("this compiler has no sanitizer libraries")
    programs = 2 * int(os.environ.get("KVT_FAULTS", "1"))
    counted = op_fuzz.fuzz(tmp_path, programs=programs, calls=60)
    assert counted["programs"] == programs
    assert counted["accepted"] > 10 * programs
    assert counted["refused"] > 5 * programs
