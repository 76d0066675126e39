"""Site + policy -> k, or "leave dense" with the reason.

topk = 0.5                                  every site keeps half of its keys
topk = {"blocks.*": 64, "*": None}          by module path, first match wins; None leaves the site dense
topk = lambda site: 32 if site.keys > 64 else None

A site that selects by itself (`site.own`) keeps its own k unless a pattern of a mapping names it: a number, a share and
a function are about the sites that do not.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from kvt_compile.passes.batch import BatchDim, batch_of, why_batch
from kvt_compile.passes.selecting import GridRule, PrefixRule, Selected, SelectRule, rule_for, selected
from kvt_compile.passes.site import AttentionSite, Axis, OwnK
from kvt_compile.select.values import SelectionError
from kvt_compile.topk import TopK, as_fraction, validate

Rule = TopK | None | Mapping[str, TopK | None] | Callable[[AttentionSite], TopK | None]
DEFAULT_TOPK = 0.5


class Rest(str):
    """The pattern `*` as a plain value among patterns means it: it is for the rest, and names no site."""


class PolicyError(ValueError):
    """A `topk`, `include` or `exclude` that cannot be meant."""


@dataclass(frozen=True)
class Policy:
    """Which sites are rewritten, and how many keys each query keeps."""

    topk: Rule = DEFAULT_TOPK
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    force_rewrite: bool = False
    axes: frozenset[Axis] = field(default_factory=lambda: frozenset({"token"}))
    select: SelectRule = None
    """In place of `topk`: which keys are kept."""
    grid: GridRule = None
    prefix: PrefixRule = None
    batch_dim: BatchDim = None
    """Which axis of the model's inputs is the batch."""

    @property
    def rule(self) -> Rule | SelectRule:
        """What says which keys are kept."""
        return self.topk if self.select is None else self.select

    @property
    def by_path(self) -> bool:
        """Whether it may say something else of the same attention in another module."""
        rules = (self.rule, self.grid, self.prefix)
        return bool(self.include or self.exclude) or any(isinstance(x, Mapping) or callable(x) for x in rules)


@dataclass(frozen=True)
class Decision:
    """`topk` keys per query for this site, or None with the reason it stays dense."""

    site: AttentionSite
    topk: TopK | OwnK | None
    reason: str = ""
    own: bool = False
    """Whether it is the model's own k that stays."""
    select: Selected | None = None
    """Which keys may be kept at all and where tokens stand; None: all may."""


def validate_rule(rule: Rule) -> Rule:
    """Checks everything about a rule that can be checked before there is a site."""
    if rule is None or callable(rule):
        return rule
    if isinstance(rule, Mapping):
        for pattern, topk in rule.items():
            if not isinstance(pattern, str):
                raise PolicyError(f"topk: patterns are module paths such as 'blocks.*.attn', got {pattern!r}")
            if topk is not None:
                validate(topk)
        return rule
    return validate(rule)


def share_of(topk: TopK) -> Fraction | None:
    """The exact fraction a float means (0.1 is one tenth), None for a number of keys."""
    return Fraction(*as_fraction(topk)) if isinstance(topk, float) else None


def decide(site: AttentionSite, policy: Policy, ranks: int = 1) -> Decision:
    """The decision for one site.  With a dynamic number of keys the comparison is left to the rewrite.

    ranks: over how many the queries and keys are cut; then a site that would stay dense, over a part of the keys, is
    rewritten and keeps all."""
    if reason := _left_out(site, policy):
        return Decision(site, None, reason)
    if (batch := batch_of(site, policy.batch_dim)) is not None:
        site = replace(site, axis="batch")
    if site.axis not in policy.axes:
        return Decision(site, None, _left_dense(site) if batch is None else why_batch(site, batch))
    rule = policy.rule
    if ranks > 1:
        return _over_ranks(site, policy, ranks, own=site.own is not None and not _names(rule, site))
    if site.own is not None and not _names(rule, site):
        return _keeps_its_own(site, site.own, policy)
    if policy.select is not None:
        return _by_selection(site, policy)
    topk = _apply(policy.topk, site)
    if topk is None:
        return Decision(site, None, "topk is None for this site")
    return _by_topk(site, topk, policy)


def asked(site: AttentionSite, policy: Policy) -> tuple[object, ...]:
    """What a policy says of a site.  Of one attention in two modules it decides the same where it says the same."""
    said = [rule_for(rule, site) for rule in (policy.rule, policy.grid, policy.prefix)]
    return _left_out(site, policy), _names(policy.rule, site), *((type(x), x) for x in said)  # 1 == 1.0, another k


def _left_out(site: AttentionSite, policy: Policy) -> str:
    """Why it is not rewritten, whatever the rest says; empty where it may be."""
    if policy.include and not any(_matches(site, pattern) for pattern in policy.include):
        return "not in `include`"
    return "in `exclude`" if any(_matches(site, pattern) for pattern in policy.exclude) else ""


def _over_ranks(site: AttentionSite, policy: Policy, ranks: int, own: bool) -> Decision:
    if own:
        return Decision(site, None, "its own k is counted among a part of the keys (name the site in `topk`)")
    if policy.select is not None:
        return Decision(site, None, "the grid of a selection is that of all tokens, and this is a part of them")
    topk = _apply(policy.topk, _whole(site, ranks))
    return Decision(site, 1.0 if topk is None else topk)


def _by_selection(site: AttentionSite, policy: Policy) -> Decision:
    try:
        topk, select = selected(site, policy.select, policy.grid, policy.prefix)
    except SelectionError as error:
        return Decision(site, None, str(error))
    if select is None:
        return _by_topk(site, topk, policy)
    if not policy.force_rewrite and select.kept == 1.0:
        dense = _by_topk(site, topk, policy)
        if dense.topk is None:
            return Decision(site, None, f"{select} keeps all {site.keys} keys")
    return Decision(site, topk, select=select)


def _by_topk(site: AttentionSite, topk: TopK, policy: Policy) -> Decision:
    if not policy.force_rewrite and isinstance(site.keys, int) and keys_kept(topk, site.keys) >= site.keys:
        return Decision(site, None, f"k = {keys_kept(topk, site.keys)} keeps all {site.keys} keys")
    return Decision(site, topk)


def _keeps_its_own(site: AttentionSite, own: OwnK, policy: Policy) -> Decision:
    topk = own if own.known is None else own.known
    if isinstance(topk, int):
        if topk < 1:
            return Decision(site, None, f"its own k is {topk}, which keeps no key")
        if not policy.force_rewrite and isinstance(site.keys, int) and topk >= site.keys:
            return Decision(site, None, f"its own k = {topk} keeps all {site.keys} keys")
    return Decision(site, topk, own=True)


def _names(rule: Rule | SelectRule, site: AttentionSite) -> bool:
    return isinstance(rule, Mapping) and any(
        _matches(site, pattern) for pattern in rule if not isinstance(pattern, Rest)
    )


def _matches(site: AttentionSite, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in site.where.names)


def _whole(site: AttentionSite, ranks: int) -> AttentionSite:
    """The site as a rule sees it: with the queries and keys of all ranks."""
    if ranks == 1:
        return site
    queries, keys = (x * ranks if isinstance(x, int) else f"{ranks}*({x})" for x in (site.queries, site.keys))
    return replace(site, queries=queries, keys=keys)


def _left_dense(site: AttentionSite) -> str:
    option = f"({site.axis}_attention='dense')"
    if site.axis == "unknown":
        return f"what is attended over is lost behind {site.lost_behind}, which is not understood {option}"
    return f"attention over {_PLURAL[site.axis]} is left dense {option}"


_PLURAL: dict[Axis, str] = {"token": "tokens", "channel": "channels", "batch": "the batch"}


def keys_kept(topk: TopK, keys: int) -> int:
    """k for a known number of keys: min(int, keys), or ceil(share * keys)."""
    share = share_of(topk)
    return min(int(topk), keys) if share is None else math.ceil(share * keys)


def _apply(rule: Rule, site: AttentionSite) -> TopK | None:
    if isinstance(rule, Mapping):
        for pattern, topk in rule.items():
            if _matches(site, pattern):
                return topk
        return None
    if callable(rule):
        answer = rule(site)
        return None if answer is None else validate(answer)
    return rule


def unmatched_patterns(policy: Policy, sites: Sequence[AttentionSite]) -> str | None:
    """A sentence about the first pattern that matches no site of the model, or None when every one does."""
    patterns = [("include", p) for p in policy.include] + [("exclude", p) for p in policy.exclude]
    for option in ("topk", "select", "grid", "prefix"):
        rule = getattr(policy, option)
        if isinstance(rule, Mapping):
            patterns += [(option, p) for p in rule]
    paths = [site.where.module for site in sites]
    for option, pattern in patterns:
        if not any(_matches(site, pattern) for site in sites):
            known = ", ".join(dict.fromkeys(paths)) or "none at all"
            return f"{option} pattern {pattern!r} matches no attention site; the sites are: {known}"
    return None
