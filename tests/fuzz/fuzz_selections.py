"""Random selections on random grids: of one call, and of whole random programs.

cases()      shapes, a grid, a prefix and a selection joined of any selectors: every lowering against the reference
texts()      a selection for programs whose number of tokens is not known when it is drawn
check(...)   a program under it: rewritten with the same meaning in every lowering, or left dense with a reason; what
             keeps every key equals dense
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fuzz_check import EXACT, ROUNDED, differences, rounding_decides, run, run_original, set_arguments, traced
from fuzz_graphs import Program
from hypothesis import assume
from hypothesis import strategies as st
from oracles import Case, assert_matches_reference
from torch import fx

from kvt_compile import SelectionError, select
from kvt_compile.kernels.c.lowering import refusal
from kvt_compile.kernels.op.selection import selection_of
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.passes.decide import Policy
from kvt_compile.passes.pipeline import run_passes
from kvt_compile.select.values import Both, Selector

Draw = Callable[[st.SearchStrategy[Any]], Any]
LARGE = 99


def _numbers(axes: int, least: int, most: int) -> st.SearchStrategy[Any]:
    one = st.integers(least, most)
    return one if axes == 1 else one | st.tuples(*[one] * axes)


def _share(most: int) -> st.SearchStrategy[int | float]:
    return st.integers(1, most) | st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])


def leaf(axes: int) -> st.SearchStrategy[Selector]:
    """One selector of any kind that does not rank."""
    size = _numbers(axes, 1, 4)
    regions = st.builds(
        select.regions, _share(4), size, by=st.sampled_from(["mean", "max"]), heads=st.sampled_from(["each", "all", 2])
    )
    return st.one_of(
        st.builds(
            select.window, size, dilation=_numbers(axes, 1, 2), stride=_numbers(axes, 1, 3), causal=st.booleans()
        ),
        st.builds(select.halo, size, _numbers(axes, 0, 2)),
        regions,
        st.builds(select.shifted, st.integers(1, 4)),
        st.builds(select.sinks, st.integers(1, 4)),
        st.builds(select.prefix, st.none() | st.integers(1, 3)),
        st.builds(select.keys, _share(6), by=st.sampled_from(["norm", "mean_query"])),
        st.builds(select.heads, _share(2)),
    )


@st.composite
def selections(draw: Draw, axes: int) -> Selector:
    """One to three selectors, joined, and maybe ranked."""
    found: Selector = draw(leaf(axes))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(leaf(axes))
        found = found & other if draw(st.booleans()) else found | other
    rank = draw(st.sampled_from([None, None, None, select.topk(3), select.topk(2, ties="lowest"), select.mass(0.6)]))
    return found if rank is None else found & rank


TOKENS = 36
PLACES = (
    ((36,), 0), ((33,), 3), ((6, 6), 0), ((4, 9), 0), ((5, 7), 1), ((7, 5), 1), ((2, 17), 2), ((2, 3, 6), 0),
    ((3, 4, 3), 0), ((5, 7, 1), 1),
)  # fmt: skip
"""Grids and prefixes of as many tokens: one C kernel computes all of them."""


@st.composite
def cases(draw: Draw) -> Case:
    """One call."""
    grid, prefix = draw(st.sampled_from(PLACES))
    chosen = draw(selections(len(grid)))
    text = str(chosen | select.prefix() if prefix and not isinstance(chosen, Both) else chosen)
    try:
        selection_of(text, grid, prefix, TOKENS, TOKENS)
    except SelectionError:
        assume(False)
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (2, 1)]))
    return Case(
        text,
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        queries=TOKENS,
        keys=TOKENS,
        topk=draw(st.sampled_from([TOKENS, TOKENS, 3])),
        select=text,
        grid=grid,
        prefix=prefix,
        seed=draw(st.integers(0, 99)),
    )


def check_lowering(case: Case, lowering: str) -> None:
    """Asserts that a lowering does what the reference does; draws another case where it has no kernel."""
    if lowering == "c":
        assume(refusal(KernelSpec("float32", "float32", 8, 8, case.score, select=case.select)) is None)
    try:
        assert_matches_reference(case, lowering)
    except AssertionError as error:
        assume("near-tie" not in str(error))
        raise AssertionError(f"{case.select} on {case.grid} + {case.prefix}: {error}\n{case}") from error


WHOLE = ("window(99) | prefix", "halo(99, 0) | prefix", "regions(1.0, 2) | prefix", "prefix(99)", "sinks(99)",
         "keys(99)", "heads(99)", "(window(99) | prefix) & topk(99)", "(regions(1.0, 1, by=max) | prefix) & mass(1.0)",
         "topk(1.0, ties=lowest)")  # fmt: skip
"""Selections that keep every key of the fuzz's programs, whatever their tokens."""


@st.composite
def options(draw: Draw) -> tuple[dict[str, Any], bool]:
    """(select, grid and prefix of a policy, whether they keep every key)"""
    grid = draw(st.sampled_from([(-1,), (2, -1), (-1, 2)]))
    whole = draw(st.integers(0, 2)) == 0
    text = draw(st.sampled_from(WHOLE)) if whole else str(draw(selections(len(grid))))
    return {"select": text, "grid": grid, "prefix": draw(st.sampled_from([0, 0, 1]))}, whole


def check(program: Program, keep: dict[str, Any], whole: bool) -> int:
    """Asserts the property for one program; how many of its attentions were rewritten."""
    tolerance = EXACT if program.exact else ROUNDED
    dense = run_original(program)
    assume(all(x.isfinite().all() for x in dense.outputs.values()))
    assume(all(x.isfinite().all() for x in dense.gradients.values() if x is not None))
    module = program.build()
    graph = traced(module, list(program.inputs.values()))
    result = run_passes(graph, Policy(**keep, force_rewrite=True), lowering="aten")
    for decision in result.decisions:
        assert decision.topk is not None or decision.reason, f"left dense without a reason\n{program!r}"
    rewritten = sum(decision.topk is not None for decision in result.decisions)
    if not rewritten:
        return 0

    def actual(lowering: str) -> Any:
        set_arguments(graph, lowering=lowering)
        for name, x in (*program.parameters.items(), *program.buffers.items()):
            module.get_parameter(name).data.copy_(x) if name in program.parameters else module.get_buffer(name).copy_(x)
        return run(fx.Interpreter(graph).run, program, module, backward=bool(dense.gradients))

    selected = actual("aten")
    for what, found in (("reference", lambda: actual("reference")), *([("dense", lambda: dense)] if whole else [])):
        if wrong := differences(selected, found(), tolerance):
            assume(not rounding_decides(program, tolerance))
            raise AssertionError(f"{keep}: aten differs from {what}: {wrong}\n{program!r}\n{graph.graph}")
    return rewritten
