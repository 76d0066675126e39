"""What a command of `kvt` that was run in this process gave (the fixture `kvt`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Result:
    code: int
    out: str
    err: str
