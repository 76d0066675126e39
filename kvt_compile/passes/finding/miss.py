"""A step of the finder that failed: which step, at which value, and why in one sentence."""

from __future__ import annotations

from kvt_compile.passes.canonical.values import Value

NEAR = ("values", "scores", "axes", "provenance", "weights", "closed", "selection")
"""Steps in the order they are tried; the nearest miss is the one that got furthest."""

ONE_KEY = "there is a single key, so there is nothing to select"
OWN_SELECTION = "it selects keys by itself, and not as k-NN attention: {}"
WIDE = "{} computes the scores in float64, of a product in {}: a kernel has them in the type of the product"
DEAD_ROWS = "{} puts numbers where weights are NaN: rows without a valid key would be zeros"
UNFED = (
    "{} goes into scores of which nothing is read, and has a gradient of zeros for it, which a kernel would not give"
)
LEARNED = "the {} are a learned table that no layer was applied to, not tokens"
CONSTANT = "the {} are a constant that the model makes of no input, not tokens"


def not_tokens(value: Value, name: str) -> str:
    """Why keys or values that are computed of no input are no tokens."""
    queue, seen = [value], {value}
    while queue:
        here = queue.pop()
        if here.kind == "source":
            return LEARNED.format(name)
        queue += [x for x in here.operands if x not in seen]
        seen.update(here.operands)
    return CONSTANT.format(name)


class Miss(Exception):  # noqa: N818 - an outcome of the search, not an error
    """One step of the finder failed: at which node, and why, in one sentence."""

    def __init__(self, step: str, value: Value, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.value = value
        self.reason = reason
