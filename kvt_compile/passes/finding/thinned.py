"""Weights that are normalised, but not as a softmax is -> a site whose rows keep their k largest.

    e = exp(s);  e / (1 + e.sum(-1, True)) @ v     ->     e is 0 but for the k largest of a row; the rest stays as it is

A row is a numerator that is nowhere negative, over something that is made of that numerator alone.  A key that is left
out has to be missing below as well as above, so all that is computed of the scores must pass one value, the numerator.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvt_compile.passes.canonical.algebra.forms import NotRead, not_negative
from kvt_compile.passes.canonical.algebra.row import Row
from kvt_compile.passes.canonical.canonicalise import CanonicalGraph
from kvt_compile.passes.canonical.coords import Coords, Space
from kvt_compile.passes.canonical.values import Value
from kvt_compile.passes.finding.describe import describe_kept
from kvt_compile.passes.finding.maps import Map, block_of, normalised_later, reason_of
from kvt_compile.passes.finding.miss import Miss
from kvt_compile.passes.finding.own.absorb import selection_between
from kvt_compile.passes.reading.facts import Facts
from kvt_compile.passes.reading.origin import keys_from
from kvt_compile.passes.reading.passing import contraction_inputs
from kvt_compile.passes.reading.provenance import kind_of_attention
from kvt_compile.passes.reading.read import Reader
from kvt_compile.passes.site import AttentionSite, Thinned

_SUMS = ("sum", "mean")


def thinned(graph: CanonicalGraph, facts: Facts, found: Map) -> AttentionSite | None:
    """The site, or None where no one value is the numerator of all."""
    later = normalised_later(found)
    last = found.product if later is None else later
    if selection_between(found.scores, last) is not None or block_of(found) is not None:
        return None  # the model selects by itself, or a row is spread over several products
    numerator = _numerator(found, last)
    if numerator is None or numerator.holder is not numerator.node or numerator.expired is not None:
        return None
    if not _all_pass(graph, found, numerator, last):
        return None
    space = Space()
    out = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(found.product.shape))
    operands = contraction_inputs(space, found.product, out)
    reader = Reader(space, lambda v: True, facts.cost, stops=frozenset({numerator}))
    reader.read(*operands[found.side])
    at = next((space.resolve_all(leaf.coords) for leaf in reader.leaves if leaf.value is numerator), None)
    summed = (space.atoms_of(operands[0][1]) & space.atoms_of(operands[1][1])) - space.atoms_of(out)
    if at is None:
        return None
    dims = [d for d, coord in enumerate(at) if set(coord.digits) & summed]
    if len(dims) != 1 or not space.covers(at[dims[0]], numerator.shape[dims[0]]):
        return None
    (dim,) = dims
    if numerator.shape[dim] == 1 or not all(_sums_over(x, dim, numerator) for x in _reductions(found, last)):
        return None
    if not _never_negative(numerator, dim):
        return None
    return _described(facts, found, numerator, dim, space, at, operands[1 - found.side])


def _numerator(found: Map, last: Value) -> Value | None:
    """What every reduction on the way reduces."""
    bases = {_base(x.inputs[0]) for x in _reductions(found, last)}
    return bases.pop() if len(bases) == 1 else None


def _reductions(found: Map, last: Value) -> list[Value]:
    """The sums of the scores' rows that the result is made of; maxima select nothing else than the row itself."""
    queue, seen, sums = [last], {last}, []
    while queue:
        here = queue.pop()
        if here is found.scores or here.index < found.scores.index:
            continue
        if here.kind == "reduce" and here.name in _SUMS:
            sums.append(here)
            continue
        parts = [found.weights] if here is found.product else list(here.operands)
        queue += [x for x in parts if x not in seen]
        seen.update(parts)
    return sums


def _base(value: Value) -> Value:
    """What is summed, before it was cast, squared or laid out."""
    while (value.kind == "pointwise" and value.name in ("identity", "abs", "square")) or value.kind == "layout":
        value = value.inputs[0]
    return value


def _sums_over(total: Value, dim: int, numerator: Value) -> bool:
    """Whether a sum runs over the keys alone; what is summed has the numerator's own axes."""
    return tuple(total.attrs["dims"]) == (dim,) and len(total.inputs[0].shape) == len(numerator.shape)


def _never_negative(value: Value, dim: int) -> bool:
    space = Space()
    frame = tuple(space.fresh(f"o{d}", size) for d, size in enumerate(value.shape))
    try:
        return not_negative(Row(space, frame[dim]).form(value, frame))
    except NotRead:
        return False


def _all_pass(graph: CanonicalGraph, found: Map, numerator: Value, last: Value) -> bool:
    """Whether all that is made of the numerator becomes the result, and the scores have no other way there.

    The largest score of a row is one: whatever is left out, it stays what it is.
    """
    if any(value is not last and (value in graph.outputs or not value.users) for value in _forwards(numerator, last)):
        return False
    queue, seen = [last], {last, numerator}
    while queue:
        here = queue.pop()
        if here is found.scores:
            return False
        if not (here.kind == "reduce" and here.name == "amax"):
            queue += [x for x in here.operands if x not in seen and x.index >= found.scores.index]
            seen.update(here.operands)
    return True


def _forwards(value: Value, last: Value) -> Iterator[Value]:
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        yield here
        if here is not last:
            queue += [x for x in here.users if x not in seen]
            seen.update(here.users)


def _described(
    facts: Facts, found: Map, numerator: Value, dim: int, space: Space, at: Coords, values: tuple[Value, Coords]
) -> AttentionSite | None:
    reader = Reader(space, lambda v: v.kind != "contraction", facts.cost, stops=frozenset({found.scores}))
    reader.read(numerator, at)
    leaf = next((leaf for leaf in reader.leaves if leaf.value is found.scores), None)
    if leaf is None:
        return None
    operands = contraction_inputs(space, found.scores, leaf.coords)
    keys = space.atoms_of([at[dim]])
    sides = [keys <= space.atoms_of(x[1]) for x in operands]
    if sides.count(True) != 1:
        return None
    key = sides.index(True)
    query = operands[1 - key]
    queries = space.atoms_of(query[1]) - space.atoms_of(operands[key][1])
    kind = kind_of_attention(space, query, operands[key], values, queries & space.atoms_of(at), keys)
    came = keys_from(space, (operands[key], values), keys)
    plan = Thinned(numerator.node, numerator, dim)
    miss = Miss("weights", numerator, reason_of(found))
    return describe_kept(
        numerator, plan, (*kind, came), operands[key][0].shape[-1], found.product.inputs[1 - found.side].shape[-1], miss
    )
