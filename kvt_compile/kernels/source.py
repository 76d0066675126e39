"""Generated code as people read it: the text, and which language it is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["c", "python"]
COMMENT: dict[Language, str] = {"c": "//", "python": "#"}


@dataclass(frozen=True)
class Source:
    """What a lowering compiles for one node."""

    language: Language
    text: str

    def headed(self, *lines: str) -> str:
        """The text under comment lines of its language."""
        return "".join(f"{COMMENT[self.language]} {line}\n" for line in lines) + "\n" + self.text
