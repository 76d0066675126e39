"""Random programs for as long as asked, a fresh seed each round: `python tests/fuzz/fuzz_long.py --minutes 60 --seed 0`.

Failures are shrunk, printed and appended to the log with the seed that found them; the exit status says whether there
were any.  Beside the fast capture that the test suite uses, some rounds go through torch.compile's own, and those with
modes, transforms and hooks through `kvt_compile.verify`.  Rows in any normalisation, models' own selections and users'
selections have rounds of their own.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode

TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, (TESTS / "fuzz", TESTS / "helpers", TESTS.parent))

import fuzz_normalisers
import fuzz_own
import fuzz_rows
import fuzz_selections
from fuzz_check import check, traced, traced_with_fakes, with_gradients
from fuzz_graphs import Program
from fuzz_modes import check_modes, modes
from fuzz_programs import anything, positives, writes
from oracles import Case

from kvt_compile.passes.canonical.values import dim_of


def through_dynamo(model: nn.Module, inputs: Sequence[Tensor], *, dynamic: bool | None = None) -> fx.GraphModule:
    """The graph torch.compile makes of the model."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*with_gradients(inputs))
    except torch._dynamo.exc.Unsupported:  # such as out= with a view that is not contiguous: no graph, nothing to judge
        reject()
    read_sizes(graphs[0])
    return with_signature_of(model, graphs[0], inputs)


def with_dynamic_sizes(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same, where no size is known before the graph runs but those that the model writes down."""
    return through_dynamo(model, inputs, dynamic=True)


def read_sizes(graph: fx.GraphModule) -> None:
    """Sizes that Dynamo has made inputs of the graph are read from its tensors."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    fakes = {node: node.meta.get("example_value") for node in placeholders}
    for node, size in fakes.items():
        if not isinstance(size, torch.SymInt):
            continue
        places = [(x, dim) for x, fake in fakes.items() if isinstance(fake, Tensor)
                  for dim, here in enumerate(fake.shape) if dim_of(here) == dim_of(size)]  # fmt: skip
        with graph.graph.inserting_after(placeholders[-1]):
            replace(node, graph.graph.call_function(torch.ops.aten.sym_size.int, places[0]))


def with_signature_of(model: nn.Module, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Dynamo's graph, which takes what is used in order of use, as a graph that takes what the model takes: its inputs
    in order, and parameters and buffers from the module."""
    taken: dict[str, fx.Node] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        owned = re.fullmatch(r"L_self_(?:parameters|buffers)_(\w+?)_", node.target)
        if owned is None:
            taken[node.target.removeprefix("L_").removesuffix("_")] = node
            continue
        setattr(graph, owned[1], getattr(model, owned[1]))
        with graph.graph.inserting_after(node):
            replace(node, graph.graph.get_attr(owned[1]))
    mode = detect_fake_mode([node.meta.get("example_value") for node in graph.graph.nodes]) or FakeTensorMode()
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        wanted = {name: graph.graph.placeholder(name) for name in inspect.signature(model.forward).parameters}
    for (name, new), x in zip(wanted.items(), inputs, strict=True):
        if name in taken:
            replace(taken[name], new)
        else:
            new.meta["example_value"] = mode.from_tensor(x, static_shapes=True)
    graph.recompile()
    return graph


def replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


Outcome = str
"""What a check says of an example; "" where there is nothing to tell."""


def programs_through(capture: Callable[..., Any]) -> Callable[[Program, int], Outcome]:
    def judge(program: Program, topk: int) -> Outcome:
        check(program, topk, capture=capture, reference=topk == 2)
        return ""

    return judge


def with_modes(program: Program, topk: int) -> Outcome:
    fate = check_modes(program, topk)
    return f"{fate}\n# {program.tags[-2:]}\n{program.texts[0]}" if fate.startswith("dropped") else fate  # type: ignore[attr-defined]


def row(drawn: fuzz_normalisers.Normalised) -> Outcome:
    fate = fuzz_rows.check(drawn)
    return fate if fate in ("fused", "none") else "a softmax, not fused"


def own(choice: dict[str, object], number: int) -> Outcome:
    fuzz_own.check(choice, number)
    return ""


def call(case: Case, lowering: str) -> Outcome:
    fuzz_selections.check_lowering(case, lowering)
    return lowering


def under_a_selection(program: Program, drawn: tuple[dict[str, Any], bool]) -> Outcome:
    return f"{fuzz_selections.check(program, *drawn)} selected"


@dataclass(frozen=True)
class Kind:
    """Examples of one kind: how they are drawn, how judged, and how many make a round."""

    drawn: tuple[st.SearchStrategy[Any], ...]
    judge: Callable[..., Outcome]
    examples: int


TOPK = st.integers(1, 5)
STRATEGIES = {"positives": positives(), "writes": writes(), "anything": anything()}
CAPTURES = {
    "traced": (traced, 400),
    "fakes": (traced_with_fakes, 60),
    "dynamo": (through_dynamo, 25),
    "dynamic": (with_dynamic_sizes, 15),
}
KINDS = {
    "modes": Kind((modes(), TOPK), with_modes, 20),
    "rows": Kind((fuzz_normalisers.normalised(),), row, 100),
    "own": Kind((fuzz_own.CHOICES, st.integers(0, 1 << 20)), own, 150),
    "calls": Kind((fuzz_selections.cases(), st.sampled_from(["aten", "aten", "aten", "c"])), call, 20),
    "selected": Kind((positives(), fuzz_selections.options()), under_a_selection, 40),
    **{
        f"{name}/{capture}": Kind((programs, TOPK), programs_through(function), examples)
        for name, programs in STRATEGIES.items()
        for capture, (function, examples) in CAPTURES.items()
    },
}
"""Modes, transforms and hooks; normalisers; a model's own selections; single calls under selections; programs under
selections; programs, by what captures them."""
EVERY = ("modes", "rows", "own", "calls", "selected", *(f"{name}/traced" for name in STRATEGIES))
IN_TURN = tuple(tuple(f"{name}/{capture}" for name in STRATEGIES) for capture in ("dynamo", "fakes", "dynamic"))
"""Kinds of every round, and those of one round in three."""


def rounds(first: int, until: float, log: Path, only: Sequence[str]) -> int:
    """Runs rounds of every kind until the clock says so; returns how many of them failed."""
    number, failed = first, 0
    counts: collections.Counter[str] = collections.Counter()
    fates: collections.Counter[str] = collections.Counter()
    while time.monotonic() < until:
        for kind in only or (*EVERY, *IN_TURN[number % len(IN_TURN)]):
            if time.monotonic() >= until:
                break
            failed += not one_round(kind, number, counts, fates, log)
        print(f"seed {number}: {sum(counts.values())} programs, {failed} failed rounds, {dict(counts)}", flush=True)
        print(f"seed {number}: what became of them: {dict(fates)}", flush=True)
        number += 1
    return failed


def one_round(
    kind: str, number: int, counts: collections.Counter[str], fates: collections.Counter[str], log: Path
) -> bool:
    """One hypothesis run; True when nothing was found.  `fates`: what became of the examples."""
    what = KINDS[kind]

    @seed(number)
    @settings(
        max_examples=what.examples, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        print_blob=False, suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(st.tuples(*what.drawn))
    def search(example: tuple[Any, ...]) -> None:
        fate, _, text = what.judge(*example).partition("\n")
        if text and not fates[f"{kind}: {fate}"]:
            print(f"{fate}\n{text}", flush=True)
        if fate:
            fates[f"{kind}: {fate}"] += 1
        counts[kind] += 1

    try:
        search()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        text = f"--- {kind}, seed {number}\n{''.join(traceback.format_exception(error))}\n"
        print(text, flush=True)
        with log.open("a") as file:
            file.write(text)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first round's seed; the next rounds count up")
    parser.add_argument("--only", action="append", default=[], choices=KINDS, help="a kind of examples; several times")
    parser.add_argument("--log", type=Path, default=Path("fuzz.log"), help="where failures are appended")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return min(rounds(arguments.seed, time.monotonic() + 60 * arguments.minutes, arguments.log, arguments.only), 1)


if __name__ == "__main__":
    sys.exit(main())
