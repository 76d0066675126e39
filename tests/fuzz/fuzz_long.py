"""Random programs for as long as asked, a fresh seed each round: `python tests/fuzz/fuzz_long.py --minutes 60 --seed 0`.

Failures are shrunk, printed and appended to the log with the seed that found them; the exit status says whether there
were any.  Beside the fast capture that the test suite uses, some rounds go through torch.compile's own, and those with modes, transforms
and hooks through `kvt_compile.verify`.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import re
import sys
import time
import traceback
from collections.abc import Sequence
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

import fuzz_programs
from fuzz_check import check, traced, traced_with_fakes, with_gradients
from fuzz_graphs import Program
from fuzz_modes import check_modes, modes


def through_dynamo(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The graph torch.compile makes of the model."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=keep, fullgraph=True)(*with_gradients(inputs))
    except torch._dynamo.exc.Unsupported:  # such as out= with a view that is not contiguous: no graph, nothing to judge
        reject()
    return with_signature_of(model, graphs[0], inputs)


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


CAPTURES = {
    "traced": (traced, 400),
    "fakes": (traced_with_fakes, 60),
    "dynamo": (through_dynamo, 25),
    "verify": (traced, 20),
}
STRATEGIES = ("positives", "writes", "anything")


def rounds(first: int, until: float, log: Path) -> int:
    """Runs rounds of every strategy and capture until the clock says so; returns how many of them failed."""
    number, failed = first, 0
    counts: collections.Counter[str] = collections.Counter()
    fates: collections.Counter[str] = collections.Counter()
    while time.monotonic() < until:
        failed += not one_round("modes", "verify", number, counts, fates, log)
        for strategy in STRATEGIES:
            for name in ("traced", "traced", "fakes", "dynamo")[number % 2 :: 2]:
                if time.monotonic() >= until:
                    break
                failed += not one_round(strategy, name, number, counts, fates, log)
        print(f"seed {number}: {sum(counts.values())} programs, {failed} failed rounds, {dict(counts)}", flush=True)
        print(f"seed {number}: with modes: {dict(fates)}", flush=True)
        number += 1
    return failed


def one_round(
    strategy: str, name: str, number: int, counts: collections.Counter[str], fates: collections.Counter[str], log: Path
) -> bool:
    """One hypothesis run; True when nothing was found.  `fates`: what became of the programs with modes."""
    capture, size = CAPTURES[name]
    programs = modes() if strategy == "modes" else getattr(fuzz_programs, strategy)()

    @seed(number)
    @settings(
        max_examples=size, deadline=None, database=None, phases=(Phase.generate, Phase.shrink), print_blob=False,
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(programs, st.integers(1, 5))
    def search(program: Program, topk: int) -> None:
        if strategy == "modes":
            fate = check_modes(program, topk)
            if fate.startswith("dropped") and not fates[fate]:
                print(f"{fate}\n# {program.tags[-2:]}\n{program.texts[0]}", flush=True)  # type: ignore[attr-defined]
            fates[fate] += 1
        else:
            check(program, topk, capture=capture, reference=topk == 2)
        counts[f"{strategy}/{name}"] += 1

    try:
        search()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        text = f"--- {strategy} through {name}, seed {number}\n{''.join(traceback.format_exception(error))}\n"
        print(text, flush=True)
        with log.open("a") as file:
            file.write(text)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first round's seed; the next rounds count up")
    parser.add_argument("--log", type=Path, default=Path("fuzz.log"), help="where failures are appended")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return min(rounds(arguments.seed, time.monotonic() + 60 * arguments.minutes, arguments.log), 1)


if __name__ == "__main__":
    sys.exit(main())
