"""scaled_dot_product_attention -> a site: the same algebra, its meaning given by torch's documentation.

SDPA(q, k, v, mask, is_causal, scale)  ->  scores  where(j <= i, scale*s + mask[b, h, i, j], -oo)
"""

from __future__ import annotations

import sympy

from kvt_compile.kernels.language import score as language
from kvt_compile.passes.canonical.coords import Coord, Coords, Space
from kvt_compile.passes.canonical.meaning import is_bool, number
from kvt_compile.passes.canonical.values import Value, broadcasts, same
from kvt_compile.passes.finding.assemble import Reading, assemble
from kvt_compile.passes.finding.describe import describe_fused
from kvt_compile.passes.finding.miss import LEARNED, ONE_KEY, Miss
from kvt_compile.passes.reading.facts import Facts
from kvt_compile.passes.reading.read import Reader, accumulation
from kvt_compile.passes.site import AttentionSite


def read_sdpa(facts: Facts, anchor: Value) -> AttentionSite:
    """The site of one call.  Raises Miss."""
    space = Space()
    query, key, value, mask, scale = anchor.inputs
    if isinstance(anchor.attrs["dropout_p"], Value):
        raise Miss("weights", anchor, "its dropout probability is known only at run time")
    rank = len(anchor.shape)
    if not all(isinstance(x, Value) and len(x.shape) >= 2 for x in (query, key, value)):
        raise Miss("scores", anchor, "scaled_dot_product_attention is called without tensors for q, k and v")
    batch = [space.fresh(f"o{d}", size) for d, size in enumerate(anchor.shape[:-2])]
    rows, keys = space.fresh("i", query.shape[-2]), space.fresh("j", key.shape[-2])
    features, out = space.fresh("d", query.shape[-1]), space.fresh("e", value.shape[-1])
    if not keys.digits:
        raise Miss("axes", anchor, ONE_KEY)

    def operand(x: Value, *last: Coord) -> tuple[Value, Coords]:
        coords: list[Coord] = []
        for d, size in enumerate(x.shape[:-2]):
            position = d + rank - len(x.shape)
            full = anchor.shape[position]
            if size == 1 or same(size, full):
                coords.append(Coord() if size == 1 else batch[position])
                continue
            parts = space.cut(batch[position], _ratio(full, size)) if anchor.attrs["enable_gqa"] else None
            if parts is None:
                raise Miss("axes", anchor, "the batch dimensions of q, k and v do not broadcast")
            coords.append(parts[0])
        return x, (*coords, *last)

    q, k, v = operand(query, rows, features), operand(key, keys, features), operand(value, keys, out)
    for x, name in ((key, "keys"), (value, "values")):
        if x not in facts.computed:
            raise Miss("provenance", anchor, LEARNED.format(name))
    scores, reader = _scores(space, facts, anchor, mask, scale, (*batch, rows, keys))
    reading = Reading(
        space, anchor, (*batch, rows), keys, q, k, v, features, (*batch, rows, out),
        anchor.dtype, anchor.dtype, scores,
        language.p, tuple(reader.leaves), reader.positions,
    )  # fmt: skip
    assembled = assemble(reading, facts)
    operands = [assembled.q.value, assembled.k.value, assembled.v.value, *(x.value for x in assembled.captured)]
    for leaf in operands:
        if leaf.expired is not None and leaf.expired <= anchor.index:
            raise Miss("closed", leaf, f"{leaf.node.name} is overwritten before it is read")
    dropout = float(anchor.attrs["dropout_p"])
    return describe_fused(
        anchor, anchor.node, assembled, (*batch, rows, out), space, frozenset(), dropout, ""
    )  # fmt: skip


def _ratio(full: object, part: object) -> int:
    return int(full) // int(part) if isinstance(full, int) and isinstance(part, int) and part else 0


def _scores(
    space: Space, facts: Facts, anchor: Value, mask: Value | None, scale: Value | float | None, coords: Coords
) -> tuple[sympy.Expr, Reader]:
    width = anchor.inputs[0].shape[-1]
    if scale is None and not isinstance(width, int):
        raise Miss("scores", anchor, "the head dimension is dynamic, so the default scale is not a number")
    reader = Reader(space, lambda v: False, facts.cost, real=accumulation(anchor.dtype))
    term = _mask(reader, mask, coords)
    factor = reader.read(scale, ()) if isinstance(scale, Value) else number(width**-0.5 if scale is None else scale)
    scores = language.mul(factor, language.s)
    if term is not None:
        scores = language.where(term, scores, -sympy.oo) if is_bool(mask) else language.add(scores, term)
    if anchor.attrs["is_causal"]:
        i, j = reader.position(coords[-2]), reader.position(coords[-1])
        scores = language.where(language.le(j, i), scores, -sympy.oo)
    return scores, reader


def _mask(reader: Reader, mask: Value | None, coords: Coords) -> sympy.Expr | None:
    if mask is None:
        return None
    tail = coords[len(coords) - len(mask.shape) :]
    if not broadcasts(mask.shape, tuple(reader.space.size(c) for c in tail)):
        raise Miss("scores", mask, "a size of the mask is known only at run time, and so is where it broadcasts")
    return reader.read(mask, tuple(Coord() if size == 1 else c for size, c in zip(mask.shape, tail, strict=True)))
