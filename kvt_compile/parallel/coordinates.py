"""A score text over whole tensors -> the text of a shard of them, and which captured tensors are cut with it.

    "s + c0[h, i, j] + where(le(j, i), 0.0, -oo)", rows cut, c0 cut along its dimension 1
    ->  "s + c0[h, i, j] + where(le(j, i + n0 - 1), 0.0, -oo)",    n0 = 1 + the first row of the shard

A coordinate of a shard counts from the shard's own first; where a text computes with it, the shard's first is added.
Sizes of the score language are at least 1, hence the 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import sympy

from kvt_compile.kernels.language import score as language

AXES = ("b", "h", "i")
"""What may be cut: batch, query heads (and their key heads), queries."""
Local = frozenset[tuple[int, str, int]]
"""(captured tensor, axis, dimension): cut along that dimension together with the axis."""


@lru_cache(maxsize=1024)
def dimension_of(texts: tuple[str, ...], slot: int, axis: str) -> int | None:
    """The dimension of captured tensor `slot` that every text indexes with nothing but `axis`; None if there is none.

    Cut along it, the tensor has what the shard reads; any other tensor has to be whole."""
    indices = [x.index for text in texts for x in language.loads(language.parse(text)) if x.slot == slot]
    if not indices:
        return None
    plain = (d for d in range(len(indices[0])) if all(str(index[d]) == axis for index in indices))
    return next(plain, None)


def of_shard(
    texts: Sequence[str], first: Mapping[str, int], local: Local, sizes: Sequence[int]
) -> tuple[list[str], list[int]]:
    """(the texts of a shard, the sizes they name).

    first: where the shard begins, of the axes that are cut.  local: the captured tensors that are cut along."""
    written, sizes = list(texts), list(sizes)
    for axis, start in first.items():
        shifted = [_shifted(text, axis, len(sizes), local) for text in written]
        if shifted != written:
            written = shifted
            sizes.append(start + 1)
    return written, sizes


@lru_cache(maxsize=1024)
def _shifted(text: str, axis: str, size: int, local: Local) -> str:
    expression = language.parse(text)
    symbol = next(x for x in (language.b, language.h, language.i, language.j) if str(x) == axis)
    moved = symbol + language.size_symbol(size) - 1

    def shift(x: sympy.Expr) -> sympy.Expr:
        if x == symbol:
            return moved
        if isinstance(x, language.load):
            cut = {dim for slot, name, dim in local if (slot, name) == (x.slot, axis)}
            index = (y if dim in cut else shift(y) for dim, y in enumerate(x.index))
            return language.load(x.args[0], *index)
        return x.func(*map(shift, x.args)) if x.args else x

    shifted = shift(expression)
    return text if shifted == expression else language.to_text(shifted)
