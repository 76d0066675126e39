"""Site -> the kernel spec its node will have, and the lowering that will run it: what `explain` can say beforehand."""

from __future__ import annotations

from kvt_compile.kernels.op import lowerings
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec, dtype_name
from kvt_compile.passes.canonical.values import Value, meta_value
from kvt_compile.passes.selecting import Selected
from kvt_compile.passes.site import AttentionSite, Fused


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
    return KernelSpec(
        dtype=dtype_name(plan.q.dtype),
        value_dtype=dtype_name(plan.v.dtype),
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        score=plan.score,
        weight=plan.weight,
        captured=tuple(CapturedSpec(dtype_name(x.dtype), len(x.shape)) for x in plan.captured if x.dtype is not None),
        sizes=len(plan.sizes),
        dropout=plan.dropout > 0.0,
        select="" if select is None else select.text,
    )


def lowering_of(site: AttentionSite, asked: str, select: Selected | None = None) -> str:
    """The name of the lowering that will run the site when `asked` is the option's value."""
    spec = spec_of(site, select)
    return asked if spec is None else lowerings.choose(asked, spec, _device(site)).name


def _device(site: AttentionSite) -> str:
    value: Value = site.plan.q.value if isinstance(site.plan, Fused) else site.plan.scores
    return str(meta_value(value.holder or value.node).device.type)
