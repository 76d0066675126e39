"""What the finder says: `AttentionSite` (this is attention, and here is its algebra) and `Refusal` (this softmax is
not, or cannot be proved to be, and here is why).  Facts travel from stop to stop in these and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from kvt_compile.passes.canonical.coords import Atom, Coord
from kvt_compile.passes.canonical.values import Value

Size = int | str
"""A size: a number, or the text of a symbolic one (`s0`) when shapes are dynamic."""

Tier = Literal["fused", "scores-kept"]
Axis = Literal["token", "channel", "batch", "unknown"]


@dataclass(frozen=True)
class KeysFrom:
    """Where the keys of a site come from: these axes of this input of the model.

    Several axes where they were made one (a map that was flattened, a batch that was merged with its tokens); the keys
    may run over a part of them (windows).  Of tensors that are joined the first that comes from an input."""

    input: str
    """What the model calls it: `x`, or `batch['image']` for what an input holds."""
    axes: tuple[int, ...]

    def __str__(self) -> str:
        """`axis 0 of x`, `axes 2 and 3 of image`"""
        *most, last = map(str, self.axes)
        return f"axes {', '.join(most)} and {last} of {self.input}" if most else f"axis {last} of {self.input}"


Names = tuple[str, ...]
"""The paths of a module: in the whole model, and in those parts of it that were compiled."""


@dataclass(frozen=True)
class Where:
    """The place in the user's model a node came from."""

    module: str
    """Module path, e.g. `blocks.0.attn`; empty at the top level."""
    file: str = ""
    line: int = 0
    also: Names = ()
    """The same path as seen from what was compiled, where that is a part of the model (`attn` in `blocks.0`)."""

    @property
    def names(self) -> Names:
        """Every path that patterns may mean it by."""
        return (self.module, *self.also)

    def moved(self, base: Names, to: Names) -> Where:
        """The same place in another module of the same class: `blocks.0.attn` of `blocks.0` -> `blocks.3.attn`."""
        inner = self.module[len(base[0]) :] if base else f".{self.module}"
        module, *also = ((f"{name}{inner}".lstrip(".")) for name in to or ("",))
        return replace(self, module=module, also=tuple(also))

    def __str__(self) -> str:
        return f"{self.module or '(top level)'}{f' at {self.file}:{self.line}' if self.file else ''}"


@dataclass(frozen=True)
class Captured:
    """A tensor of the model that takes part in the score or weight expression."""

    name: str
    """The graph's name for it, e.g. `relative_position_bias`."""
    shape: tuple[Size, ...]
    dtype: str
    index: str
    """How it is read, e.g. `mask[b % 4, i, j]`."""
    requires_grad: bool = False


@dataclass(frozen=True)
class Operand:
    """A tensor the rewritten node reads: a value of the graph, and which atoms each of its dimensions runs over."""

    value: Value
    coords: tuple[Coord, ...]
    dtype: torch.dtype
    """The dtype it must be cast to (that of the product it took part in)."""


@dataclass(frozen=True)
class Groups:
    """The axes of a site as atoms, most significant first.  Query heads are `kv_heads` x `group`."""

    batch: tuple[Atom, ...]
    kv_heads: tuple[Atom, ...]
    group: tuple[Atom, ...]
    queries: tuple[Atom, ...]
    keys: tuple[Atom, ...]
    features: tuple[Atom, ...]
    value_features: tuple[Atom, ...]


@dataclass(frozen=True)
class Fused:
    """How to replace `node` (the product with the values) by one `kvt::attention` call."""

    node: fx.Node
    q: Operand
    k: Operand
    v: Operand
    groups: Groups
    out: tuple[tuple[Atom, ...], ...]
    """The atoms of each dimension of the node's own result."""
    score: str
    weight: str
    captured: tuple[Value, ...]
    sizes: tuple[tuple[Atom, ...], ...]
    """n0, n1, ...: dynamic sizes the expressions need, each as the product of these atoms' sizes."""
    dropout: float
    dropout_module: str
    sources: tuple[Value, ...]
    """q, k and v as the model passed them to the products: dead too, unless somebody else reads them."""
    interior: frozenset[Value]
    """What lies between the two products: dead once the node is replaced.  The model's own selection is part of it."""


@dataclass(frozen=True)
class ScoresKept:
    """How to replace the softmax `node` by one `kvt::topk_softmax` call."""

    node: fx.Node
    scores: Value
    dim: int
    written: bool
    """Whether the model writes to the weights afterwards: the op keeps its own result for the backward."""
    selection: frozenset[Value] = frozenset()
    """The model's own selection: dead once the node is replaced."""


@dataclass(frozen=True)
class Thinned:
    """How to leave out of the weights that `node` computes all but the k largest of a row.  The model normalises them
    later, and not as a softmax does."""

    node: fx.Node
    scores: Value
    dim: int


Plan = Fused | ScoresKept | Thinned


@dataclass(frozen=True)
class OwnK:
    """How many keys a model keeps by itself: a number, or what a node holds (`number + node`), or, counted from the
    number of keys (`Nk + number`, `Nk + number - node`)."""

    text: str
    """As a person reads it: `100`, `s0//2`."""
    number: int = 0
    node: fx.Node | None = None
    from_keys: bool = False
    minus: bool = False
    size: Any = field(default=None, compare=False)
    """The symbolic expression, where it is no number."""

    @property
    def known(self) -> int | None:
        return self.number if self.node is None and not self.from_keys else None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AttentionSite:
    """One place that computes softmax(Q Kᵀ) V.

    q is [batch, heads, queries, head_dim], k [batch, kv_heads, keys, head_dim], v [batch, kv_heads, keys, value_dim].
    """

    where: Where
    softmax: fx.Node
    tier: Tier
    axis: Axis
    batch: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size
    value_dim: Size
    dtype: str
    score: str
    """f(s, b, h, i, j, captured), in the score language with captured tensors by name."""
    weight: str
    """What follows the softmax, as an expression in p: `p`, `p*dropout`, `p*gate[h]`."""
    captured: tuple[Captured, ...]
    plan: Plan
    tier_reason: str = ""
    """For the scores-kept tier: why the site could not be fused."""
    anchor: Value | None = field(default=None, compare=False, repr=False)
    """The softmax (or SDPA call) in the canonical graph, from which all that was read can be reached."""
    lost_behind: str = ""
    """For an unknown axis: the operation that is not understood."""
    own: OwnK | None = None
    """How many keys the model keeps by itself, where it selects them."""
    keys_from: KeysFrom | None = None
    """From which axis of which input of the model the keys come; None where that cannot be followed."""


@dataclass(frozen=True)
class Refusal:
    """One softmax (or SDPA call) that is left as the model wrote it, and why, in one sentence."""

    node: fx.Node
    where: Where
    reason: str
    step: str
    """The step of the finder that failed (the nearest miss): `scores`, `values`, `provenance`, `closed`, ..."""
    at: fx.Node | None = None
    """The node it failed at, where that is another one."""
    anchor: Value | None = field(default=None, compare=False, repr=False)
    """The refused value in the canonical graph."""
