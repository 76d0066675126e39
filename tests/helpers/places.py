"""Where the files are that several rooms of the tests read."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
FACTORIES = str(HELPERS / "factories.py")  # tiny models for SPECs: FACTORIES:NAME
GOLDEN = TESTS / "golden"
IMPORTABLE = (
    HELPERS,
    TESTS,
    ROOT,
    ROOT / "examples",
)  # for another process's path
