"""Text in, text out: a spelling of attention as code, what the finder reads of it and makes of it, and a neighbour.

    A bias is part of the scores.                     what the file shows, in one line
                                                      (blank)
    q, k, v: 2 3 5 4; bias: 5 5                       a case: its inputs and their shapes,
        return (q @ k.mT + bias).softmax(-1) @ v      its code,
    fused: s + bias[i, j]                             what becomes of each softmax, in program order,
        v0: f32[2, 3, 5, 4] = input q                 and the values that were read there
        ...
    but: q, k, v: 2 3 5 4                             the neighbour: a case of which nothing is fused
        return (q @ k.mT).softmax(-2) @ v
    left alone (values): the softmax axis is not ...

The first case of a file is fused, those after `also:` are too, and of those after `but:` (one at least) nothing is.
`make texts` writes what follows the code anew, to be read before it is committed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from fuzz_check import traced
from places import TESTS
from readings import module_of
from torch import Tensor, nn

import kvt_compile
from kvt_compile.passes.canonical.canonicalise import canonicalise
from kvt_compile.passes.finding.find import find
from kvt_compile.passes.finding.seen import seen_text

_INDENT = "    "


@dataclass(frozen=True)
class Case:
    file: str
    word: str
    """Empty for the first of a file, else `but` or `also`."""
    shapes: dict[str, tuple[int, ...]]
    code: str
    found: str

    @property
    def name(self) -> str:
        return f"{self.file}{f' {self.word}' if self.word else ''}"

    def module(self) -> nn.Module:
        body = f"def function({', '.join(self.shapes)}):\n{self.code}\n"
        names = {"torch": torch, "F": F}
        exec(body, names)
        return module_of(names["function"])

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator, dtype=dtype) for shape in self.shapes.values()]


def read(path: Path) -> tuple[str, list[Case]]:
    """The title and the cases of a file."""
    title, _, rest = path.read_text(encoding="utf-8").partition("\n\n")
    cases: list[Case] = []
    for block in rest.strip("\n").split("\n\n"):
        head, *lines = block.split("\n")
        word, found = re.match(r"(?:(but|also): )?(.*)", head).groups()  # type: ignore[union-attr]
        shapes = {
            name.strip(): tuple(map(int, sizes.split()))
            for names, sizes in (part.split(":") for part in found.split(";"))
            for name in names.split(",")
        }
        code = next((n for n, line in enumerate(lines) if not line.startswith(_INDENT)), len(lines))
        cases.append(Case(path.stem, word or "", shapes, "\n".join(lines[:code]), "\n".join(lines[code:])))
    return title, cases


def written(title: str, cases: Sequence[Case]) -> str:
    blocks = [title]
    for case in cases:
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, shape in case.shapes.items():
            shapes.setdefault(shape, []).append(name)
        head = "; ".join(f"{', '.join(names)}: {' '.join(map(str, shape))}" for shape, names in shapes.items())
        parts = [f"{case.word}: {head}" if case.word else head, case.code, case.found]
        blocks.append("\n".join(part for part in parts if part))
    return "\n\n".join(blocks) + "\n"


def found(case: Case) -> str:
    """What the finder makes of the case now."""
    result = find(canonicalise(traced(case.module(), case.inputs(torch.float32))))
    said: list[tuple[int, str, str]] = []
    for site in result.sites:
        assert site.anchor is not None
        weight = "" if site.weight == "p" else f", then {site.weight}"
        what = f"{site.score}{weight}" if site.tier == "fused" else site.tier_reason
        kind = site.tier if site.axis == "token" else f"{site.tier} over {site.axis}s"
        said.append((site.anchor.index, f"{kind}: {what}", seen_text(site.anchor)))
    for refusal in result.refusals:
        assert refusal.anchor is not None
        text = seen_text(refusal.anchor)
        said.append((refusal.anchor.index, f"left alone ({refusal.step}): {refusal.reason}", text))
    lines: list[str] = []
    for _, outcome, text in sorted(said):
        lines += [outcome, *(_INDENT + line for line in text.split("\n"))]
    return "\n".join(lines)


def assert_means_the_same(case: Case) -> None:
    """At k = N the rewritten model is the model: outputs, inputs afterwards, gradients; and with fewer keys what the
    reference lowering says."""
    module, inputs = case.module(), case.inputs(torch.float64)

    def rewritten(**options: object) -> nn.Module:
        return kvt_compile.rewrite(traced(module, inputs), *inputs, **options).module

    with torch.no_grad():
        expected, before = _run(module, inputs)
        actual, after = _run(rewritten(topk=1.0, force_rewrite=True), inputs)
        fewer = [_run(rewritten(topk=2, lowering=name), inputs)[0] for name in ("auto", "reference")]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fewer[0], fewer[1], rtol=1e-9, atol=1e-9)
    if not re.search(r"_\(|[-+*/]= |\] = ", case.code):  # autograd refuses writes to a leaf
        _assert_gradients(module, rewritten(topk=1.0, force_rewrite=True), inputs)


def _run(module: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    fresh = [x.clone() for x in inputs]
    return module(*fresh), fresh


def _assert_gradients(module: nn.Module, rewritten: nn.Module, inputs: Sequence[Tensor]) -> None:
    both = []
    for run in (module, rewritten):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        both.append(torch.autograd.grad(out, leaves, slope, allow_unused=True))
    torch.testing.assert_close(both[1], both[0], rtol=1e-9, atol=1e-9)


def assert_a_neighbour(file: Path) -> None:
    """The first case is found, what is also found is found, and of a neighbour nothing is fused."""
    title, cases = read(file)
    assert title
    assert "\n" not in title
    assert {case.word for case in cases[1:]} >= {"but"}, "no neighbour"
    for case in cases:
        outcomes = [line for line in case.found.split("\n") if not line.startswith(_INDENT)]
        fused = [line for line in outcomes if line.startswith("fused")]
        assert fused == (outcomes if case.word != "but" else []), case.name
        assert outcomes or case.word == "but", case.name


def files(room: str) -> list[Path]:
    return sorted((TESTS / room / "texts").glob("*.txt"))


def cases_of(room: str) -> list[Case]:
    return [case for path in files(room) for case in read(path)[1]]


def main() -> None:
    for path in files("canonical") + files("finding"):
        title, cases = read(path)
        new = [Case(c.file, c.word, c.shapes, c.code, found(c)) for c in cases]
        path.write_text(written(title, new), encoding="utf-8")
        print(path.relative_to(TESTS))


if __name__ == "__main__":
    main()
