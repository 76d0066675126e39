"""A mistake of the user's -> one sentence that says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Its text is the whole message; `main` prints it and exits with code 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'vit_tiny_patch16_224'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def in_one_line(error: BaseException) -> str:
    """An exception as `ValueError: what it says`, its first line only."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
