"""A report's row, or the module path of one -> the code generated for that site, under a header that names it."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvt_compile.kernels import lowerings

if TYPE_CHECKING:
    from kvt_compile.report import SiteReport


def kernel_source(sites: Sequence[SiteReport], wanted: SiteReport | str) -> str:
    """The code of the one kernel that the wanted sites share.

    Raises LookupError when no site is meant, when several kernels are, or when the site has no generated code.
    """
    found = _matching(sites, wanted) if isinstance(wanted, str) else [wanted]
    kernels: dict[object, SiteReport] = {}
    for site in found:
        kernels.setdefault((site.spec, site.lowering), site)
    if len(kernels) > 1:
        raise LookupError(
            f"{wanted!r} means {len(found)} sites with {len(kernels)} different kernels; "
            f"name one of them: {_listed([site.module for site in kernels.values()])}"
        )
    site = found[0]
    if site.outcome == "dense":
        raise LookupError(f"{_path(site)} is left dense, so nothing is generated for it: {site.reason}")
    if site.spec is None:
        raise LookupError(f"{_path(site)} has a head dimension known only at run time; give inputs of a fixed size")
    source = lowerings.get(site.lowering).source(site.spec)
    if source is None:
        raise LookupError(f"the lowering {site.lowering!r} of {_path(site)} calls torch's operators, it generates none")
    return source.headed(*(f"{_path(x)}  {x.location}".rstrip() for x in found))


def _matching(sites: Sequence[SiteReport], pattern: str) -> list[SiteReport]:
    found = [site for site in sites if site.module == pattern]
    found = found or [site for site in sites if fnmatch.fnmatchcase(site.module, pattern)]
    if found:
        return found
    paths = [site.module for site in sites]
    if not paths:
        raise LookupError("the model has no attention site")
    near = difflib.get_close_matches(pattern, paths, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LookupError(f"no attention site {pattern!r}; there are {_listed(paths)}{hint}")


def _path(site: SiteReport) -> str:
    return site.module or "(top level)"


def _listed(paths: Sequence[str], most: int = 8) -> str:
    named = [repr(path) for path in dict.fromkeys(paths)]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")
