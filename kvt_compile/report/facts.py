"""Attention sites, refusals and graphs, as facts: frozen dataclasses of text and numbers, and nothing that shows them.

    AttentionSite + (k, reason, lowering)  ->  SiteReport      one row
    Refusal                                ->  RefusalReport   one row
    fx.Graph before and after              ->  GraphReport     nodes, and which of them are a site's

No graph node and no tensor is in them: facts can be kept, pickled and compared.  Views (table.py, page/ ...) take
`Findings`; the face (report.py) is `Findings` with all the views.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.passes.finding.seen import seen_text
from kvt_compile.passes.selecting import Selected
from kvt_compile.passes.site import AttentionSite, Axis, Captured, KeysFrom, Refusal, Size, Where
from kvt_compile.report.names import renamed, renamed_sources, short_names, with_name

Outcome = Literal["fused", "scores-kept", "dense"]
Kind = Literal["input", "weight", "operation", "output"]


@dataclass(frozen=True)
class SiteReport:
    """One attention of the model.

    q is [batch, heads, queries, head_dim], k [batch, kv_heads, keys, head_dim], v [batch, kv_heads, keys, value_dim];
    a size is a number, or the text of a symbolic one when shapes are dynamic.
    """

    module: str
    """Module path, e.g. `blocks.0.attn`; empty at the top level."""
    location: str
    """The line of the model's code, e.g. `timm/layers/attention.py:98`; empty where the graph carries none."""
    outcome: Outcome
    """fused: one kernel; scores-kept: fused selection and softmax, the rest as written; dense: left as it was."""
    reason: str
    """Why it was left dense, or why its scores had to be kept; empty where it is fused."""
    axis: Axis
    batch: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size
    value_dim: Size
    dtype: str
    topk: Size | None
    """Keys kept per query; None where the site is left dense."""
    score: str
    """What is compared and goes into the softmax, as an expression in the raw score s and captured tensors."""
    weight: str
    """What follows the softmax, as an expression in its result p."""
    captured: tuple[Captured, ...]
    lowering: str
    """How the site is computed: `aten`, `c`, ...; empty where it is left dense."""
    spec: KernelSpec | SoftmaxSpec | None = None
    """What the generated code depends on; None where it is left dense, or known only at run time."""
    graph: int = 0
    """Which captured graph it is in: a model that breaks into several graphs has several."""
    own_k: str = ""
    """The model's own k, where it selects keys by itself: `100`, `s0//2`.  It stays unless `topk` names the site."""
    keeps_own: bool = False
    """Whether it stays."""
    select: str = ""
    """Which keys may be kept: `window(13) | prefix`, `given(Predictor) & topk(64)`; empty where all may."""
    grid: str = ""
    """Where the tokens stand, if the selection asks: `14x14 + 1`."""
    kept: float | None = None
    """The share of pairs of query and key that the selection allows; None where that is known only at run time."""
    keys_input: str = ""
    """The input of the model that the keys come from; empty where that cannot be followed."""
    keys_axes: tuple[int, ...] = ()
    """Which of its axes they run over: several where these were made one; maybe a part of them (windows)."""
    runs: int = 1
    """How often its graph ran: one that a loop calls from one place serves all these calls, whatever they mean."""
    canonical: str = field(default="", compare=False, repr=False)
    """What the finder read, as text: the values around its softmax, one a line (`Report.canonical`)."""

    @property
    def keys_from(self) -> str:
        """`axis 1 of x`; empty where it cannot be followed."""
        return str(KeysFrom(self.keys_input, self.keys_axes)) if self.keys_input else ""

    @property
    def selection(self) -> str:
        """`window(13) | prefix on 14x14 + 1: 66 % of the keys`; empty where there is none."""
        where = f" on {self.grid}" if self.grid else ""
        return f"{self.select}{where}{'' if self.kept is None else f': {self.share} of the keys'}"

    @property
    def share(self) -> str:
        """`66 %`: how many keys a selection allows; empty where that is not known beforehand."""
        return "" if self.kept is None else f"{100 * self.kept:.3g} %"

    @property
    def unranked(self) -> bool:
        """Whether a selection keeps all that it allows, so that k says nothing."""
        return bool(self.select) and self.topk == self.keys

    @classmethod
    def of(
        cls,
        site: AttentionSite,
        *,
        topk: Size | None,
        reason: str = "",
        lowering: str = "",
        spec: KernelSpec | SoftmaxSpec | None = None,
        graph: int = 0,
        own: bool = False,
        select: Selected | None = None,
        runs: int = 1,
    ) -> SiteReport:
        """The row of a site for which `topk` was decided; `reason` says why where that is None (left dense)."""
        dense = topk is None
        names = short_names(site.captured)
        return cls(
            module=site.where.module,
            location=location_of(site.where),
            outcome="dense" if dense else site.tier,
            reason=reason or ("" if dense else site.tier_reason),
            axis=site.axis,
            batch=site.batch,
            heads=site.heads,
            kv_heads=site.kv_heads,
            queries=site.queries,
            keys=site.keys,
            head_dim=site.head_dim,
            value_dim=site.value_dim,
            dtype=site.dtype,
            topk=topk,
            score=renamed(site.score, names),
            weight=renamed(site.weight, names),
            captured=tuple(with_name(tensor, names) for tensor in site.captured),
            lowering="" if dense else lowering,
            spec=None if dense else spec,
            graph=graph,
            runs=runs,
            keys_input="" if site.keys_from is None else site.keys_from.input,
            keys_axes=() if site.keys_from is None else site.keys_from.axes,
            own_k=str(site.own or ""),
            keeps_own=own,
            select="" if select is None else select.whole,
            grid="" if select is None else select.where,
            kept=None if select is None else select.kept,
            canonical="" if site.anchor is None else renamed_sources(seen_text(site.anchor)),
        )


@dataclass(frozen=True)
class RefusalReport:
    """One softmax (or attention call) that is left as the model wrote it, and why."""

    node: str
    """Its name in the captured graph."""
    module: str
    location: str
    reason: str
    """In one sentence."""
    step: str
    """The step of the finder that failed: the nearest miss."""
    graph: int = 0
    at: str = ""
    """The node the step failed at; empty where it is `node` itself."""
    canonical: str = field(default="", compare=False, repr=False)
    """As that of a site."""

    @classmethod
    def of(cls, refusal: Refusal, *, graph: int = 0) -> RefusalReport:
        return cls(
            node=refusal.node.name,
            module=refusal.where.module,
            location=location_of(refusal.where),
            reason=refusal.reason,
            step=refusal.step,
            at="" if refusal.at in (None, refusal.node) else str(refusal.at),
            graph=graph,
            canonical="" if refusal.anchor is None else renamed_sources(seen_text(refusal.anchor)),
        )


@dataclass(frozen=True)
class NodeReport:
    """One node of a graph."""

    name: str
    kind: Kind
    """weight: a parameter, a buffer or a constant."""
    target: str
    """What it calls, e.g. `softmax` or `kvt.attention`; what a weight is called in its module."""
    module: str
    """Module path, e.g. `blocks.0.attn`; empty at the top level."""
    location: str
    """The line of the model's code; empty where the graph carries none."""
    inputs: tuple[str, ...]
    """Names of the nodes it reads, each once."""
    shape: tuple[Size, ...] | None
    """None where its value is not one tensor."""
    dtype: str
    code: str
    """The call as it might be written, e.g. `softmax(scores, dim=-1)`."""

    @property
    def line(self) -> str:
        """`attn: [2, 3, 197, 197] = softmax(scores, dim=-1)`"""
        shape = "" if self.shape is None else f": [{', '.join(map(str, self.shape))}]"
        return f"{self.name}{shape} = {self.code}"


@dataclass(frozen=True)
class SiteNodes:
    """The nodes of one attention."""

    site: int
    """Its place in `Report.sites`."""
    anchor: str
    """The node that stands for it: its softmax (or SDPA call) before the rewrite."""
    before: tuple[str, ...]
    """What is the attention's own: dense sites keep these."""
    after: tuple[str, ...]
    """What replaces it; empty where it is left dense."""
    anchor_after: str = ""
    """Its `kvt::` node; empty where it is left dense."""


@dataclass(frozen=True)
class GraphReport:
    """One graph, before and after the rewrite, each in the order it runs."""

    graph: int
    """Which captured graph it is in."""
    name: str
    """Empty, or the name of a graph nested in it: `wrap_body_0`."""
    before: tuple[NodeReport, ...]
    after: tuple[NodeReport, ...]
    sites: tuple[SiteNodes, ...]
    refusals: Mapping[int, str]
    """Place in `Report.refusals` -> the node that was refused."""

    @property
    def title(self) -> str:
        return f"graph {self.graph}{f', {self.name}' if self.name else ''}"


@dataclass(frozen=True)
class Findings:
    """What was found in a model, what became of it, and what was left alone."""

    sites: tuple[SiteReport, ...]
    refusals: tuple[RefusalReport, ...]
    graphs: tuple[GraphReport, ...] = field(default=(), repr=False)
    """The captured graphs before and after the rewrite, those nested in them included."""

    @property
    def counts(self) -> dict[str, int]:
        """How many sites there are, how many of each outcome, and how many refusals."""
        outcomes = Counter(site.outcome for site in self.sites)
        return {
            "sites": len(self.sites),
            "fused": outcomes["fused"],
            "scores-kept": outcomes["scores-kept"],
            "dense": outcomes["dense"],
            "refusals": len(self.refusals),
        }

    @property
    def summary(self) -> str:
        """One line, e.g. `12 sites: 12 fused, 0 scores-kept, 0 left dense; 1 softmax left alone`."""
        n = self.counts
        found = f"{n['sites']} {'site' if n['sites'] == 1 else 'sites'}: {n['fused']} fused, "
        found += f"{n['scores-kept']} scores-kept, {n['dense']} left dense"
        return f"{found}; {n['refusals']} {'softmax' if n['refusals'] == 1 else 'softmaxes'} left alone"


def location_of(where: Where) -> str:
    """`timm/layers/attention.py:98`; empty where the graph carries no line."""
    return f"{_short(where.file)}:{where.line}" if where.file else ""


@lru_cache(maxsize=1024)
def _short(file: str) -> str:
    """A file as it would be imported: `timm/layers/attention.py`, whatever folder the packages are in."""
    path = Path(file)
    folders = [Path(folder or ".").resolve() for folder in [*sys.path, "."]]
    inside = [path.relative_to(folder) for folder in folders if path.is_relative_to(folder)]
    return str(min(inside, key=lambda p: len(p.parts), default=path))
