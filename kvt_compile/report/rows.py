"""A module path, or a pattern of them -> the rows of a report that it means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import TypeVar

from kvt_compile.report.facts import RefusalReport, SiteReport

Row = TypeVar("Row", SiteReport, RefusalReport, SiteReport | RefusalReport)


def matching(sites: Sequence[Row], pattern: str) -> list[Row]:
    """The rows with that module path, else those whose path fits the pattern.  Raises LookupError for none."""
    found = [site for site in sites if site.module == pattern]
    found = found or [site for site in sites if fnmatch.fnmatchcase(site.module, pattern)]
    if found:
        return found
    paths = [site.module for site in sites]
    if not paths:
        raise LookupError("the model has no attention site")
    near = difflib.get_close_matches(pattern, paths, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LookupError(f"no attention site {pattern!r}; there are {listed(paths)}{hint}")


def path_of(row: SiteReport | RefusalReport) -> str:
    return row.module or "(top level)"


def listed(paths: Sequence[str], most: int = 8) -> str:
    named = [repr(path) for path in dict.fromkeys(paths)]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")
