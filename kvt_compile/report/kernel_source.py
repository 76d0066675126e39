"""A report's row, or the module path of one -> the code generated for that site, under a header that names it.

for this machine: what the site's lowering compiles        for a target: "cpu" -> C, "sm_90", "gfx942", ... -> Triton
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.source import Source
from kvt_compile.report.facts import SiteReport
from kvt_compile.report.rows import listed, matching, path_of


def kernel_source(sites: Sequence[SiteReport], wanted: SiteReport | str, target: str | None = None) -> str:
    """The code of the one kernel that the wanted sites share, on this machine or for a `target`: "cpu", or a GPU
    architecture that Triton kernels are compiled for ("sm_90", ...).

    Raises LookupError when no site is meant, when several kernels are, when the site has no generated code, or for an
    unknown target.
    """
    if target is not None and target not in (known := _targets()):
        raise LookupError(f"unknown target {target!r}, expected one of {', '.join(known)}")
    found = matching(sites, wanted) if isinstance(wanted, str) else [wanted]
    kernels: dict[object, SiteReport] = {}
    for site in found:
        kernels.setdefault((site.spec, site.lowering), site)
    if len(kernels) > 1:
        raise LookupError(
            f"{wanted!r} means {len(found)} sites with {len(kernels)} different kernels; "
            f"name one of them: {listed([site.module for site in kernels.values()])}"
        )
    site = found[0]
    if site.outcome == "dense":
        raise LookupError(f"{path_of(site)} is left dense, so nothing is generated for it: {site.reason}")
    if site.spec is None:
        raise LookupError(f"{path_of(site)} has a head dimension known only at run time; give inputs of a fixed size")
    source = lowerings.get(site.lowering).source(site.spec) if target is None else _for(target, site, site.spec)
    if source is None:
        raise LookupError(
            f"the lowering {site.lowering!r} of {path_of(site)} calls torch's operators, it generates none"
        )
    return source.headed(*(f"{path_of(x)}  {x.location}".rstrip() for x in found))


def _targets() -> tuple[str, ...]:
    from kvt_compile.kernels.triton import TARGETS  # generators are imported when code is asked for

    return "cpu", *TARGETS


def _for(target: str, site: SiteReport, spec: KernelSpec | SoftmaxSpec) -> Source | None:
    from kvt_compile.kernels import c, triton

    # not `supports`, which asks about this machine's compiler and GPU too, and warns
    reason = c.refusal(spec) if target == "cpu" else triton.refusal(spec)
    if reason is not None:
        raise LookupError(f"nothing is generated for {path_of(site)} on {target}: {reason}")
    if target == "cpu":
        return lowerings.get("c").source(spec)
    specs = [spec]
    if isinstance(spec, KernelSpec):  # forward and backward are modules of their own
        trained = (captured.requires_grad for captured in site.captured)
        specs.append(dataclasses.replace(spec, needs_grad=(True, True, True, *trained)))
    sizes = {name: x for name in ("queries", "keys") if isinstance(x := getattr(site, name), int)}
    return Source("python", "\n\n".join(triton.source(x, target, **sizes) for x in specs))
