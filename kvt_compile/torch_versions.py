"""The versions of torch that the test suite is run on, and what is said of any other."""

from __future__ import annotations

import re

import torch

OLDEST, NEWEST = (2, 11), (2, 14)
"""The first and the last release that was tried; `make test-versions` runs the suite on both."""


def numbers(version: str) -> tuple[int, int]:
    """2.14.0a0+git1 -> (2, 14)"""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def is_too_old(version: str | None = None) -> bool:
    """Whether it (the torch that runs, unless given) lacks what the package is built on."""
    return numbers(version or torch.__version__) < OLDEST


def is_untried(version: str | None = None) -> bool:
    """Whether it is newer than any that the test suite was run on."""
    return numbers(version or torch.__version__) > NEWEST


def text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def untried() -> str:
    """What a user of a newer torch should know."""
    return (
        f"kvt_compile has been tried on torch {text(OLDEST)} to {text(NEWEST)}, and this is torch {torch.__version__}: "
        "it is likely to work, but how torch writes its graphs may have changed.  `kvt doctor` checks what runs, "
        "kvt_compile.explain(model, *inputs) shows what is found"
    )
