"""A run's folder -> report.md: what was measured held against the bars, on which card with which versions, and what is
missing.  Standard library only.

    python -m benchmarks.gpu.report FOLDER      print it, and nothing else
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import BARS, MODEL, Bar, bars_of
from benchmarks.gpu.cells import COMPILED, EAGER, FLEX, OURS, SDPA, TOLERANT, races
from benchmarks.gpu.folder import Folder

CONTESTANTS = (OURS, TOLERANT, SDPA, FLEX, EAGER, COMPILED)
RATIOS = ("time / sdpa", "tolerant / sdpa", "flex / time", "eager / time", "compiled / time", "memory / sdpa")


def text(folder: Folder) -> str:
    """The whole report, of whatever files there are."""
    found = {name: folder.load(f"{name}.json") for name in ("run", "machine", "correct", "tuned", "speed", "profile")}
    parts = [_head(found), _bars(found["speed"]), _correct(found["correct"]), _races(found["speed"])]
    parts += [_profile(found["profile"]), _tuned(found["tuned"]), _steps(found["run"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: dict[str, Any]) -> str:
    about = found["machine"].get("about", {})
    versions = about.get("versions", {})
    if found["run"].get("dry"):
        first = "# Dry run: launched on a driver that runs nothing. No number was computed or timed."
    else:
        first = f"# k-NN attention on {about.get('gpu') or 'an unknown GPU'}"
    card = [f"capability {about['capability']}"] if about.get("capability") else []
    card += [f"driver {about['driver']}"] if about.get("driver") else []
    card += [f"CUDA {about['cuda']}"] if about.get("cuda") else []
    card += [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    card += [f"Python {about['python']}"] if about.get("python") else []
    card += [f"kvt-compile {versions['kvt-compile']}"] if versions.get("kvt-compile") else []
    card += [f"commit {about['commit']}"] if about.get("commit") else []
    return "\n\n".join([first, ", ".join([*card, about.get("date", "")]).strip(", ")]).strip()


def measured(bar: Bar, speed: dict[str, Any]) -> dict[str, float]:
    """Cell -> ratio, of every cell that a bar is about."""
    if bar.ratio == MODEL:
        models = speed.get("models", {})
        return {name: m["ratios"][MODEL] for name, m in models.items() if m["train"] and MODEL in m["ratios"]}
    known = {str(race.cell): race.cell for race in races()}
    return {
        record["cell"]: record["ratios"][bar.ratio]
        for record in speed.get("races", {}).values()
        if record["cell"] in known and bar.of(known[record["cell"]]) and bar.ratio in record["ratios"]
    }


def _bars(speed: dict[str, Any]) -> str:
    rows = []
    for bar in BARS:
        found = measured(bar, speed)
        sign = "≥" if bar.at_least else "≤"
        row = [bar.name, f"{sign} {bar.must:g} ×", f"{sign} {bar.aim:g} ×" if bar.aim else "-"]
        if not found:
            rows.append([*row, "-", "not measured", ""])
            continue
        worst = bar.worst(list(found.values()))
        said = (
            "NOT MET" if not bar.met(worst) else "met" if not bar.aim or not bar.met(worst, bar.aim) else "met, aim too"
        )
        where = next(name for name, ratio in found.items() if ratio == worst)
        rows.append([*row, f"{worst:.2f} ×", said, f"{where} (of {len(found)})"])
    return "## Bars (H100 or H200, bfloat16, D = 64, k = N/2 or a window)\n\n" + _table(
        ["bar", "must", "aim", "worst", "", "worst cell"], rows
    )


def _races(speed: dict[str, Any]) -> str:
    cells: dict[str, list[dict[str, Any]]] = {}
    for record in speed.get("races", {}).values():
        cells.setdefault(record["cell"], []).append(record)
    known = {str(race.cell): race.cell for race in races()}
    rows = []
    for name, records in cells.items():
        ms = {who: t for record in reversed(records) for who, t in record["ms"].items()}
        ratios = {key: x for record in reversed(records) for key, x in record["ratios"].items()}
        bars = {bar.ratio: bar for bar in bars_of(known[name])} if name in known else {}
        row = [name, *(f"{ms[who]:.4f}" if who in ms else "-" for who in CONTESTANTS)]
        for key in RATIOS:
            mark = "" if key not in bars or key not in ratios else " ok" if bars[key].met(ratios[key]) else " NO"
            row.append(f"{ratios[key]:.2f}{mark}" if key in ratios else "-")
        if len(row) > row.count("-") + 1:
            rows.append(row)
    models = [
        f"- ViT-B/16, {name}: "
        + (f"{m['ms']['ours']:.2f} ms, dense torch.compile {m['ms']['dense']:.2f} ms" if m["ms"] else m["dropped"])
        for name, m in speed.get("models", {}).items()
    ]
    table = _table(["cell", *(f"{who} ms" for who in CONTESTANTS), *RATIOS], rows) if rows else ""
    parts = ["## Times", table, "\n".join(models), "\n".join(_missing(speed))]
    return "\n\n".join(part for part in parts if part) if cells or models else ""


def _missing(speed: dict[str, Any]) -> Iterator[str]:
    """Why numbers are absent, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for record in speed.get("races", {}).values():
        for who, why in record["dropped"].items():
            reasons.setdefault(f"{who}: {why}", []).append(record["cell"])
    for reason, where in reasons.items():
        yield f"- {reason} ({where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})"
    if left := len(races()) - len(speed.get("races", {})):
        yield f"- {left} of {len(races())} races were not begun"


def _correct(correct: dict[str, Any]) -> str:
    cells, tests = correct.get("cells", {}), correct.get("tests", {})
    lines = []
    if cells:
        wrong = {name: found["wrong"] for name, found in cells.items() if found["wrong"]}
        what = "launched" if correct.get("dry") else "right, forward and backward, against float64"
        lines.append(f"- {len(cells) - len(wrong)} of {len(cells)} cells {what}")
        lines += [f"- WRONG: {name}: {'; '.join(faults)}" for name, faults in wrong.items()]
    if "left out" in tests:
        lines.append(f"- tests that need a GPU: left out: {tests['left out']}")
    elif tests:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in tests["counts"].items()) or "none ran"
        lines.append(f"- tests that need a GPU: {counts}{'' if tests.get('finished') else '; cut short'}")
        lines += [f"- FAILED: {x['test']}: {x['said']}" for x in tests["failed"]]
        lines += [f"- without {x}" for x in tests.get("without", [])]
    return "## Right or wrong\n\n" + "\n".join(lines) if lines else ""


def _profile(profile: dict[str, Any]) -> str:
    lines = []
    for name, record in profile.get("cells", {}).items():
        lines.append(f"- {name}")
        for key in ("kernels", "without"):
            if key in record:
                numbers = ", ".join(f"{k} {'-' if v is None else v}" for k, v in record[key].items())
                lines.append(
                    f"  - {'ms of each kernel' if key == 'kernels' else 'ms of the forward without'}: {numbers}"
                )
        if "counters" in record:
            found = record["counters"]
            lines.append(f"  - Nsight Compute: {found.get('left out') or ', '.join(found)}")
    return "## Taken apart\n\n" + "\n".join(lines) if lines else ""


def _tuned(tuned: dict[str, Any]) -> str:
    rows = []
    for entry in tuned.get("results", []):
        blocks = " ".join(f"{key}={value}" for key, value in entry["winner"].items())
        ms = entry["measured"][0]["milliseconds"] if entry["measured"] else None
        shape = entry["key"]["shape"]
        rows.append(
            [entry["key"]["part"], f"{shape['queries']}x{shape['keys']}", blocks, "-" if ms is None else f"{ms:.4f}"]
        )
    return "## Block sizes\n\n" + _table(["kernel", "class", "fastest", "ms"], rows) if rows else ""


def _steps(run: dict[str, Any]) -> str:
    rows = []
    for name, found in run.get("steps", {}).items():
        about = "; ".join(found[key] for key in ("reason", "said") if key in found)
        seconds = f"{found['seconds']:.0f} of {found['limit']:.0f}" if "seconds" in found else "-"
        rows.append([found["part"], name, found["status"], seconds, about])
    rows += [
        ["", name, "not begun", "-", ""] for name in run.get("steps asked for", []) if name not in run.get("steps", {})
    ]
    return "## Steps\n\n" + _table(["part", "step", "ended", "seconds", ""], rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with columns that line up."""
    wide = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head) - 1)] + [max(len(head[-1]), 3)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in (head, *rows)]
    rule = "|".join("-" * (width + 2) for width in wide)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def write(folder: Folder) -> None:
    folder.write("report.md", text(folder))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    print(text(Folder(Path(sys.argv[1]))), end="")
