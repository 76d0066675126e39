"""expected.json -> `Entry`s: every model of the zoo, how it is built, and what is true of it.

What is true was counted on the model's eager run, from the data flow between its tensors and not from any graph:

    sites     softmax(Q Kᵀ) V computed, as the axis attended over -> module paths
    others    softmaxes computed that are not attention, as module paths
    inductor  how many attentions Inductor's own matcher turns into scaled_dot_product_attention (CPU, float32, eval)
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("expected.json")


@dataclass(frozen=True)
class Entry:
    """One model in one mode, and what is true of it."""

    library: str
    """timm, torchvision, transformers, torch.nn, or a package of `elsewhere`."""
    name: str
    attention: str
    """eager: scores written out; sdpa: scaled_dot_product_attention where the model has the choice; "" no choice."""
    family: str
    """What shares its attention code: the timm file, the transformers type."""
    batch: int
    image: int | None
    """Side of the images; None: what the model was made for."""
    sites: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    inductor: int | None = None
    """None: not measured in this mode."""
    gradients: bool = False
    """The member of its family whose gradients are compared as well."""
    small: dict[str, Any] = field(default_factory=dict)
    """More settings that make a large model small enough for that."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor."""

    @property
    def id(self) -> str:
        """`timm/vit_tiny_patch16_224/eager`"""
        return "/".join(part for part in (self.library, self.name, self.attention) if part)

    @property
    def count(self) -> int:
        """How many true sites there are."""
        return sum(map(len, self.sites.values()))


def entries(only: str = "*") -> list[Entry]:
    """The entries whose id matches a pattern (`fnmatch` style, or any part of the id)."""
    pattern = only if any(c in only for c in "*?[") else f"*{only}*"
    return [entry for entry in _load() if fnmatch.fnmatchcase(entry.id, pattern)]


def _load() -> Iterator[Entry]:
    for record in json.loads(FILE.read_text()):
        yield Entry(**{**record, "sites": {k: unfold(v) for k, v in record.get("sites", {}).items()},
                       "others": unfold(record.get("others", []))})  # fmt: skip


def save(all_entries: list[Entry]) -> None:
    """Writes expected.json: one model per line, defaults left out, counted module paths folded."""
    lines = []
    for entry in all_entries:
        record = {
            key: value for key, value in vars(entry).items() if key in _REQUIRED or value != _DEFAULTS.get(key, value)
        }
        if entry.sites:
            record["sites"] = {axis: _fold(paths) for axis, paths in entry.sites.items()}
        if entry.others:
            record["others"] = _fold(entry.others)
        lines.append(json.dumps(record))
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


_REQUIRED = ("library", "name", "attention", "family", "batch", "image")
_DEFAULTS: dict[str, Any] = {
    "sites": {}, "others": [], "inductor": None, "gradients": False, "small": {}, "settings": {},
}  # fmt: skip


def _fold(paths: list[str]) -> list[str]:
    """["blocks.0.attn", "blocks.1.attn", "pool", "pool"] -> ["blocks.{0..1}.attn", "pool *2"]"""
    runs: list[tuple[str, int, int, str]] = []  # before, first, last, after
    for path in [f"{path} *{n}" if n > 1 else path for path, n in _counted(paths)]:
        before, first, last, after = runs[-1] if runs else ("", 0, 0, "")
        if runs and path == f"{before}{last + 1}{after}":
            runs[-1] = (before, first, last + 1, after)
        else:
            runs.append(_at_the_last_number(path))
    return [
        f"{before}{'{' + f'{first}..{last}' + '}' if last > first else '' if first < 0 else first}{after}"
        for before, first, last, after in runs
    ]


def _counted(paths: list[str]) -> Iterator[tuple[str, int]]:
    for path, same in itertools.groupby(paths):
        yield path, len(list(same))


def _at_the_last_number(path: str) -> tuple[str, int, int, str]:
    """One path -> the run it starts: `blocks.3.attn *2` -> `blocks.`, 3, 3, `.attn *2`; the last number counts up."""
    found = [*re.finditer(r"(?<=\.)\d+(?=\.| |$)", path.partition(" ")[0])]
    if not found:
        return path, -1, -1, ""
    number = found[-1]
    return path[: number.start()], int(number[0]), int(number[0]), path[number.end() :]


def unfold(folded: list[str]) -> list[str]:
    """Module paths written out again."""
    paths: list[str] = []
    for text in folded:
        text, _, times = text.partition(" *")
        before, brace, rest = text.partition("{")
        numbers, _, after = rest.partition("}")
        first, _, last = numbers.partition("..")
        for path in [f"{before}{n}{after}" for n in range(int(first), int(last) + 1)] if brace else [text]:
            paths += [path] * int(times or 1)
    return paths
