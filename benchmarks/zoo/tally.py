"""What the passes found, beside what is true of the model -> missed, false, unexplained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.zoo.catalogue import Entry
from kvt_compile.verification.ways import Rewrites

Place = tuple[str, str]
"""axis, module path"""


@dataclass(frozen=True)
class Tally:
    fused: int
    kept: int
    dense: int
    missed: list[str]
    false: list[str]
    refused: list[tuple[str, str]]
    unexplained: int
    kept_reasons: list[str]


def tally(entry: Entry, rewrites: Rewrites, executed: tuple[int, ...]) -> Tally:
    """Counts over every execution of every graph: layers that share code may share a captured graph.

    A softmax counts once, however many products read its weights.
    """
    found: list[Place] = []
    tiers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    refused: list[tuple[str, str]] = []
    for number in executed:
        result = rewrites.results[number]
        softmaxes = {decision.site.softmax: decision.site for decision in result.decisions}
        for site in softmaxes.values():
            found.append((site.axis, site.where.module))
            tiers[site.tier if site.axis == "token" else "dense"] += 1
            if site.tier != "fused":
                reasons[site.tier_reason] += 1
        refused += [(refusal.where.module, refusal.reason) for refusal in result.refusals]
    true = [(axis, path) for axis, paths in entry.sites.items() for path in paths]
    missed, false = unmatched(true, found, shared=len(set(executed)) > 1)
    return Tally(
        fused=tiers["fused"],
        kept=tiers["scores-kept"],
        dense=tiers["dense"],
        missed=[f"{path} ({axis})" for axis, path in missed],
        false=[f"{path} ({axis})" for axis, path in false],
        refused=refused,
        unexplained=max(0, len(missed) + len(entry.others) - len(refused)),
        kept_reasons=[f"{reason} *{n}" if n > 1 else reason for reason, n in reasons.items()],
    )


def unmatched(true: list[Place], found: list[Place], *, shared: bool) -> tuple[list[Place], list[Place]]:
    """What is left of both once each place was paired with its like.

    Paths agree when one leads to the other (a softmax may be a module of its own); where several graphs were captured,
    a graph that layers share carries the path of the first of them, and the axis alone has to do.
    """
    true, found = list(true), list(found)
    rules = [lambda a, b: a == b, lambda a, b: a[0] == b[0] and _along(a[1], b[1])]
    rules += [lambda a, b: a[0] == b[0]] if shared else []
    for rule in rules:
        for place in list(true):
            match = next((other for other in found if rule(place, other)), None)
            if match is not None:
                true.remove(place)
                found.remove(match)
    return true, found


def _along(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
