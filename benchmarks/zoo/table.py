"""Verdicts -> a line while running, a table for people, zoo.json for programs, docs/zoo.md for readers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.zoo import ROOT, elsewhere
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.judge import Verdict

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"
COLUMNS = ("model", "true", "fused", "kept", "dense", "missed", "false", "unexplained", "left alone",
           "k = N: error / budget", "Inductor")  # fmt: skip
Pair = tuple[Entry, Verdict]


def cells(entry: Entry, verdict: Verdict) -> list[str]:
    check = verdict.checks.get("k = N")
    return [
        entry.id, *map(str, (
            entry.count, verdict.fused, verdict.kept, verdict.dense, len(verdict.missed), len(verdict.false),
            verdict.unexplained, len(verdict.refused),
        )),
        f"{check['error']:.0e} / {check['budget']:.0e}" if check else "-",
        "-" if entry.inductor is None else str(entry.inductor),
    ]  # fmt: skip


def line(count: int, of: int, entry: Entry, verdict: Verdict) -> str:
    """One finished model, while the others run."""
    problems = "; ".join(verdict.problems[:4])
    state = f"[red]{problems}[/red]" if problems else "[green]ok[/green]"
    found = f"{verdict.fused} fused, {verdict.kept} kept, {verdict.dense} dense of {entry.count}"
    return f"{count}/{of} {entry.id}: {found}, {verdict.seconds:.0f} s: {state}"


def totals(pairs: Iterable[Pair]) -> dict[str, int]:
    """Sums over models; `rewritten_or_dense` is what has to be 100 % of `true_sites`."""
    pairs = list(pairs)
    measured = [e for e, _ in pairs if e.inductor is not None]
    return {
        "models": len({(e.library, e.name) for e, _ in pairs}),
        "runs": len(pairs),
        "true_sites": sum(e.count for e, _ in pairs),
        "fused": sum(v.fused for _, v in pairs),
        "scores_kept": sum(v.kept for _, v in pairs),
        "left_dense": sum(v.dense for _, v in pairs),
        "missed": sum(len(v.missed) for _, v in pairs),
        "false_matches": sum(len(v.false) for _, v in pairs),
        "unexplained": sum(v.unexplained for _, v in pairs),
        "softmaxes_left_alone": sum(len(v.refused) for _, v in pairs),
        "models_with_problems": sum(bool(v.problems) for _, v in pairs),
        "gradient_checks": sum("gradients" in v.checks for _, v in pairs),
        "inductor_fused": sum(e.inductor or 0 for e in measured),
        "inductor_of": sum(e.count for e in measured),
    }


def summary(t: dict[str, int]) -> list[str]:
    share = t["fused"] / max(1, t["fused"] + t["scores_kept"])
    return [
        f"{t['models']} models in {t['runs']} runs, {t['true_sites']} true sites: {t['fused']} fused "
        f"({share:.1%} of those rewritten), {t['scores_kept']} scores-kept, {t['left_dense']} left dense by default "
        f"(attention over channels or the batch), {t['missed']} missed",
        f"{t['false_matches']} false matches, {t['softmaxes_left_alone']} other softmaxes left alone with a reason, "
        f"{t['unexplained']} without",
        f"{t['models_with_problems']} runs with a problem; gradients compared for {t['gradient_checks']} families",
        f"Inductor's own matcher, where it was counted: {t['inductor_fused']} of {t['inductor_of']}",
    ]


def rich_table(pairs: Sequence[Pair]) -> RenderableType:
    """The table, the problems one a line, and the totals."""
    shown = Table(box=SIMPLE_HEAD)
    for n, name in enumerate(COLUMNS):
        shown.add_column(name, justify="left" if n == 0 else "right", overflow="fold")
    for entry, verdict in pairs:
        if entry.count or entry.others or verdict.problems:
            shown.add_row(*cells(entry, verdict), style="red" if verdict.problems else None)
    problems = [Text(f"{e.id}: {problem}", style="red") for e, v in pairs for problem in v.problems]
    return Group(shown, *problems, *map(Text, summary(totals(pairs))))


def write(pairs: Sequence[Pair]) -> None:
    """benchmarks/results/zoo.json and docs/zoo.md."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    models = [asdict(v) | {"expected": e.sites, "inductor": e.inductor, "problems": v.problems} for e, v in pairs]
    for model in models:
        for changing in ("seconds", "pass_seconds"):
            del model[changing]
    RESULTS.write_text(json.dumps({"totals": totals(pairs), "models": models}, indent=1) + "\n")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(pairs))


def judged_before(libraries: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Id -> what zoo.json has of the models of some libraries, or of all."""
    models = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else []
    return {
        record["id"]: record for record in models if libraries is None or record["id"].partition("/")[0] in libraries
    }


def page(pairs: Sequence[Pair]) -> str:
    """docs/zoo.md."""
    parts = [_HEAD, "\n".join(f"- {text}" for text in summary(totals(pairs)))]
    problems = [f"- `{e.id}`: {problem}" for e, v in pairs for problem in v.problems]
    parts += ["## Problems", "\n".join(problems)] if problems else []
    others = elsewhere.packages()
    for library in dict.fromkeys(e.library for e, _ in pairs if e.library not in others):
        parts += _part(library, [(e, v) for e, v in pairs if e.library == library])
    if part := [(e, v) for e, v in pairs if e.library in others]:
        parts += _part(
            "Libraries the project was not made for", part, f"{len({e.library for e, _ in part})} packages. "
        )
    parts.append("## Why scores are kept\n\n" + _reasons((e, r) for e, v in pairs for r in v.kept_reasons))
    parts.append("## Why softmaxes are left alone\n\n" + _reasons((e, r) for e, v in pairs for _, r in v.refused))
    return "\n\n".join(parts) + "\n"


def _part(title: str, part: Sequence[Pair], said: str = "") -> list[str]:
    """One heading, its sums and its table."""
    t = totals(part)
    header = "| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1)
    rows = [f"| {' | '.join(cells(e, v))} |" for e, v in part if e.count or e.others]
    parts = [
        f"## {title}\n\n{said}{t['true_sites']} true sites in {t['runs']} runs: {t['fused']} fused, "
        f"{t['scores_kept']} scores-kept, {t['left_dense']} left dense, {t['missed']} missed.",
        "\n".join([header, *rows]),
    ]
    if without := [e.id.partition("/")[2] for e, _ in part if not (e.count or e.others)]:
        parts.append(f"No softmax at all, and nothing matched: {', '.join(without)}.")
    return parts


def _reasons(given: Iterable[tuple[Entry, str]]) -> str:
    """Reason -> the families it was given in; the numbers in node names, and counts, make no other reason."""
    families: dict[str, dict[str, None]] = {}
    for entry, reason in given:
        general = re.sub(r"(?<=[a-z])_\d+\b| \*\d+$", "", reason)
        families.setdefault(general, {})[f"{entry.library} {entry.family}"] = None
    lines = [f"| {reason} | {', '.join(names)} |" for reason, names in families.items()]
    return "\n".join(["| reason | models |", "|---|---|", *lines])


_HEAD = """# The zoo

Made by `make zoo`; do not edit. Every model below was built with random weights, which were perturbed so that nothing
stays at zero, and captured by torch.compile. What is *true* of a model was counted on its eager run, from the data flow
between its tensors (`benchmarks/zoo/expected.json`).

- **true**: sites the model has; **fused**: one kernel from the two products to the output; **kept** (scores-kept):
  selection and softmax are one kernel, the rest stays as the model wrote it; **dense**: attention over channels or over
  the batch, dense unless `channel_attention` / `batch_attention` is `"rewrite"`.
- **missed**: true sites not found; **false**: found, but not attention or over another axis; **unexplained**: softmaxes
  about which nothing was said; **left alone**: the rest, each with a reason (below).
- **k = N**: every site, also those left dense by default, rewritten and keeping all its keys, against the dense model
  in float64, relative to the largest output; the budget is 8 times the dense model's own float32 error. Gradients and
  k < N are compared for one model per family (`benchmarks/results/zoo.json`).
- **Inductor**: how many sites torch 2.13's own attention patterns turn into SDPA on a CPU; - where it was not
  counted.
"""
