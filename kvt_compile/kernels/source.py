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
        """The text under comment lines of its language.  Module paths and file names are a model's: what could end or
        continue a comment line is written as an escape."""
        return "".join(f"{COMMENT[self.language]} {_one_line(line)}\n" for line in lines) + "\n" + self.text


def _one_line(text: str) -> str:
    # a backslash at its end, or its trigraph, would join the next line to a C comment
    plain = (x if x.isascii() and x.isprintable() and x not in "\\?" else f"<{ord(x):x}>" for x in text)
    return "".join(plain)
