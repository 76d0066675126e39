"""Captured tensors of a call on a part of the sequence: which are cut with it, and which cannot be told.

c0[h]          the same on every rank              c0[b, j]     its keys: a rank has those of its own keys
c0[h, i]       its rows: a rank has its own        c0[h, i, j]  refused: a part of neither rows nor keys
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import Tensor

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.parallel import coordinates


class ContextParallelError(RuntimeError):
    """Attention over a part of a sequence that cannot be made that over the whole of it."""


@dataclass(frozen=True)
class Cut:
    """How the captured tensors of a call lie: captured tensor -> its dimension."""

    rows: dict[int, int]
    keys: dict[int, int]

    def local(self, axis: str) -> coordinates.Local:
        """As `coordinates.of_shard` wants it."""
        return frozenset((slot, axis, dim) for slot, dim in {"i": self.rows, "j": self.keys}[axis].items())


def cut_of(call: AttentionCall) -> Cut:
    """Raises ContextParallelError for a selection, and for captured tensors whose rows or keys are not read plainly."""
    if call.selection is not None:
        raise ContextParallelError(
            "attention inside context_parallel has a selection (`select`), whose grid is that of all tokens; expected "
            "`topk` alone, or a window of rows and keys by their places (`Context.positions`)"
        )
    spec, texts = call.spec, (call.spec.score, call.spec.weight)
    cut = Cut({}, {})
    for slot, tensor in enumerate(call.captured):
        loads = [x for x in (*spec.score_loads, *spec.weight_loads) if x.slot == slot]
        read = {axis for axis in "ij" for x in loads if any(_reads(index, axis) for index in x.index)}
        if not read:
            continue
        shown = ", ".join(dict.fromkeys(language.to_text(x) for x in loads))
        if read == {"i", "j"}:
            raise _refusal(shown, tensor, "it has both rows and keys, of which this rank has a part each")
        axis = read.pop()
        count = call.q.shape[2] if axis == "i" else call.keys
        dim = coordinates.dimension_of(texts, slot, axis)
        others = [x for load in loads for d, x in enumerate(load.index) if d != dim and _reads(x, axis)]
        if dim is None or others or tensor.shape[dim] != count:
            what = "rows" if axis == "i" else "keys"
            raise _refusal(shown, tensor, f"its {what} are not the {count} {what} of this rank")
        (cut.rows if axis == "i" else cut.keys)[slot] = dim
    symbols = {str(x) for text in texts for x in language.parse(text).free_symbols}
    if {"i", "j"} <= symbols and call.q.shape[2] != call.keys:
        raise ContextParallelError(
            f"the score {spec.score!r} compares rows with keys, and this rank has {call.q.shape[2]} rows and "
            f"{call.keys} keys, expected as many: how the two lie to each other in the whole sequence is not known"
        )
    return cut


def _reads(index: sympy.Expr, axis: str) -> bool:
    return axis in {str(x) for x in index.free_symbols}


def _refusal(loads: str, tensor: Tensor, why: str) -> ContextParallelError:
    return ContextParallelError(
        f"attention inside context_parallel reads a captured tensor of shape {tuple(tensor.shape)} as {loads}, but "
        f"{why}. Expected one without rows and keys, or one that is cut along one of them as the tokens are. A causal "
        "mask is is_causal=True, or a comparison of the places of rows and of keys (`Context.positions`)"
    )
