"""Site -> the kernel spec its node will have, the lowering that will run it, and how much of its scores that computes:
what `explain` can say beforehand."""

from __future__ import annotations

import torch

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec, dtype_name
from kvt_compile.kernels.tiles import tile_lists
from kvt_compile.passes.canonical.values import Value, meta_value
from kvt_compile.passes.selecting import Selected
from kvt_compile.passes.site import AttentionSite, Fused
from kvt_compile.report.facts import SiteReport
from kvt_compile.select.function import GIVEN
from kvt_compile.select.geometry import Geometry
from kvt_compile.select.values import by_content

TILE = 32
"""Queries of a tile of the generated C with AVX-512; with AVX2 they are fewer, and a little less is computed."""


def spec_of(site: AttentionSite, select: Selected | None = None) -> KernelSpec | SoftmaxSpec | None:
    """The spec of the site's node under a selection; None when a head dimension is dynamic, so that it is known only at
    run time."""
    plan = site.plan
    if not isinstance(plan, Fused):
        dtype = plan.scores.dtype
        assert dtype is not None
        return SoftmaxSpec.of(dtype, meta_value(plan.node).dtype)
    if not isinstance(site.head_dim, int) or not isinstance(site.value_dim, int):
        return None
    score = plan.score
    captured = tuple(CapturedSpec(dtype_name(x.dtype), len(x.shape)) for x in plan.captured if x.dtype is not None)
    if select is not None and select.functions is not None and (given := select.functions.condition) is not None:
        score = given.around(score, len(captured))
        captured += tuple(CapturedSpec("bool", len(dims)) for dims in given.dims)
    return KernelSpec(
        dtype=dtype_name(plan.q.dtype),
        value_dtype=dtype_name(plan.v.dtype),
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        score=score,
        weight=plan.weight,
        captured=captured,
        sizes=len(plan.sizes),
        dropout=plan.dropout > 0.0,
        select="" if select is None else select.text,
    )


def lowering_of(site: AttentionSite, asked: str, select: Selected | None = None) -> str:
    """The name of the lowering that will run the site when `asked` is the option's value."""
    spec = spec_of(site, select)
    return asked if spec is None else lowerings.choose(asked, spec, _device(site)).name


def computed_share(site: SiteReport) -> float | None:
    """Of all pairs of query and key those that the generated kernel multiplies under the site's selection, in tiles of
    `TILE` queries; what tensors choose is computed as it is kept.  None where nothing is known beforehand, and where
    torch's operators multiply them all."""
    sizes = site.heads, site.queries, site.keys
    if not site.select or site.lowering in ("", "aten", "reference") or not all(isinstance(x, int) for x in sizes):
        return None
    if GIVEN in site.select:  # a condition of the score is read after the score is there
        return None
    heads, queries, keys = (int(x) for x in sizes)
    geometry = Geometry.read(site.grid)
    selection = selection_of(site.select, geometry.grid, geometry.prefix, queries, keys)
    if selection is None or selection.allowed is None or 0 in (heads, queries, keys):
        return None
    if by_content(selection.allowed):
        return site.kept
    q, k = (torch.empty(1, heads, n, 1, device="meta") for n in (queries, keys))
    return tile_lists(selection, q, k, TILE).listed / (queries * keys)


def selection_text(site: SiteReport) -> str:
    """`window(13) | prefix on 64x64 + 1: 4.1 % of the keys, 7 % computed`; empty where there is no selection."""
    share = computed_share(site)
    return site.selection + ("" if share is None else f", {100 * share:.3g} % computed")


def _device(site: AttentionSite) -> str:
    value: Value = site.plan.q.value if isinstance(site.plan, Fused) else site.plan.scores
    return str(meta_value(value.holder or value.node).device.type)
