"""`make zoo`: judges every model of the zoo, prints the table, writes benchmarks/results/zoo.json and docs/zoo.md.

    python -m benchmarks.zoo [--only PATTERN] [--jobs N] [--timeout S] [--again] [--shallow] [--table] [--inductor]

Verdicts go to a log as they come (build/zoo.jsonl), and what the log has is not judged again: an interrupted run goes
on where it stopped.  --again judges the chosen models anew.  The two files are written when the log has every model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.zoo import ROOT, catalogue, elsewhere, table
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.inductor import matched
from benchmarks.zoo.judge import Verdict, judge
from benchmarks.zoo.pool import each_in_a_process

LOG = ROOT / "build" / "zoo.jsonl"


def main() -> int:
    options = parse()
    console = Console(highlight=False, width=max(120, Console().width))
    entries = catalogue.entries(options.only)
    if not entries:
        console.print(f"no model matches {options.only!r}; an id looks like timm/vit_tiny_patch16_224/eager")
        return 2
    missing = sorted({entry.library for entry in entries if not elsewhere.is_here(entry.library)})
    if missing:
        console.print(f"not judged, for they are not installed: {', '.join(missing)} ({elsewhere.HOW})")
        entries = [entry for entry in entries if entry.library not in missing]
    if options.inductor:
        return count_matches(entries, options, console)
    if not options.table:
        judge_all(entries, options, console)
    before = table.judged_before()
    now = {id: with_earlier_checks(record, before.get(id)) for id, record in read(options.log).items()}
    known = {id: verdict_of(record) for id, record in {**table.judged_before(missing), **now}.items()}
    pairs = [(entry, known[entry.id]) for entry in entries if entry.id in known]
    console.print(table.rich_table(pairs))
    everything = catalogue.entries()
    if all(entry.id in known for entry in everything):
        table.write([(entry, known[entry.id]) for entry in everything])
    return int(any(verdict.problems for _, verdict in pairs))


def judge_all(entries: Sequence[Entry], options: argparse.Namespace, console: Console) -> None:
    """Fills the log."""
    known = {} if options.again else read(options.log)
    deep = {id for id, record in known.items() if record.get("deep")}
    waiting = [e for e in entries if e.id not in known or (e.gradients and not options.shallow and e.id not in deep)]
    waiting.sort(key=lambda entry: not entry.gradients)  # one of every family first: surprises come early
    source = fingerprint()

    def work(number: int, result: dict[str, Any]) -> None:
        verdict = Verdict(waiting[number].id)
        try:
            judge(waiting[number], deep=not options.shallow, verdict=verdict)
        finally:
            result.update(asdict(verdict))

    prepare()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("a") as log:
        done = each_in_a_process(work, range(len(waiting)), jobs=options.jobs, timeout=options.timeout)
        for count, (number, result) in enumerate(done, 1):
            record = {"id": waiting[number].id, "source": source, "deep": not options.shallow, **result}
            log.write(json.dumps(record) + "\n")
            log.flush()
            console.print(table.line(count, len(waiting), waiting[number], verdict_of(record)), soft_wrap=True)


def count_matches(entries: Sequence[Entry], options: argparse.Namespace, console: Console) -> int:
    """Counts what Inductor's matcher does and keeps it in expected.json."""
    waiting = [entry for entry in entries if entry.count and entry.attention != "sdpa"]
    counted: dict[str, int] = {}

    def work(number: int, result: dict[str, Any]) -> None:
        result["inductor"] = matched(waiting[number])

    prepare()
    for number, result in each_in_a_process(work, range(len(waiting)), jobs=options.jobs, timeout=options.timeout):
        entry = waiting[number]
        console.print(f"{entry.id}: {result.get('inductor', result.get('failure'))} of {entry.count}")
        if "inductor" in result:
            counted[entry.id] = result["inductor"]
    catalogue.save([replace(e, inductor=counted.get(e.id, e.inductor)) for e in catalogue.entries()])
    return int(len(counted) < len(waiting))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose id matches, e.g. 'timm/swin*'")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="models at a time")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds a model may take")
    parser.add_argument("--again", action="store_true", help="judge anew what the log already has")
    parser.add_argument("--shallow", action="store_true", help="gradients and k < N keep their last verdict")
    parser.add_argument("--table", action="store_true", help="judge nothing, show what the log has")
    parser.add_argument("--inductor", action="store_true", help="count what Inductor's matcher finds, instead")
    parser.add_argument("--log", type=Path, default=LOG, help="where verdicts are kept")
    return parser.parse_args()


def prepare() -> None:
    """Imports what every child needs, once, and makes it quiet and single-threaded."""
    warnings.filterwarnings("ignore")
    import timm
    import torch
    import torchvision
    import transformers

    import kvt_compile

    del timm, torchvision, kvt_compile
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def fingerprint() -> str:
    """Which state of the library judges: a hash over its source files."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kvt_compile").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def read(log: Path) -> dict[str, dict[str, Any]]:
    """Id -> its latest record."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {record["id"]: record for record in records}


def with_earlier_checks(record: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """A shallow record with what was found of gradients and k < N before, where as many sites were fused then."""
    if record["deep"] or before is None or before["fused"] != record["fused"]:
        return record
    return {**record, "checks": {**before["checks"], **record["checks"]}}


def verdict_of(record: dict[str, Any]) -> Verdict:
    return Verdict(**{key: value for key, value in record.items() if key in Verdict.__dataclass_fields__})


if __name__ == "__main__":
    sys.exit(main())
