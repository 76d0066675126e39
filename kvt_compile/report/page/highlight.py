"""Source text -> HTML with coloured words, and the style sheet for it in light and dark."""

from __future__ import annotations

from functools import lru_cache

from pygments import highlight as _highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CLexer, PythonLexer

LIGHT, DARK = "xcode", "github-dark"
_LEXERS = {"c": CLexer, "python": PythonLexer}


def highlighted(text: str, language: str) -> str:
    """`<span>`s without a surrounding element; every line begins at the start of a line."""
    formatter = HtmlFormatter(nowrap=True)
    html: str = _highlight(text, _LEXERS[language](stripnl=False), formatter)
    return html


@lru_cache(maxsize=1)
def style_sheet() -> tuple[str, str]:
    """(rules for light, rules for dark), for code inside `.source`."""
    light, dark = ("\n".join(line for line in _rules(style) if line.startswith(".source .")) for style in (LIGHT, DARK))
    return light, dark


def _rules(style: str) -> list[str]:
    text: str = HtmlFormatter(style=style, nobackground=True).get_style_defs(".source")
    return text.splitlines()
