"""The generated Triton itself: readable, deterministic text, each part of it written once."""

from __future__ import annotations

import ast
import difflib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
from triton_specs import CAUSAL, DOUBLE, DROPOUT, SOFTCAP, SPECS, SWIN, VIT, VIT32, path_of, training

from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton import bounds, source
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import PARTS, candidates, default, family
from kvt_compile.kernels.triton.generate import module_source
from kvt_compile.kernels.triton.layout import parts, widest_part

TEMPLATES = Path(bounds.__file__).parent / "templates"
LONGEST_RUN = 12


@pytest.mark.parametrize("name", SPECS)
def test_golden(name: str) -> None:
    expected = path_of(name).read_text(encoding="utf-8")
    found = module_source(SPECS[name])
    difference = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "generated"))
    assert not difference, f"{difference}\nIf this is meant: make golden"


def test_no_golden_source_is_stale() -> None:
    folder = path_of("vit").parent
    assert set(folder.glob("*.py.txt")) == {path_of(name) for name in SPECS}


def test_the_text_depends_on_the_spec_alone() -> None:
    program = (
        "from kvt_compile.kernels.triton.generate import module_source\n"
        "from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec\n"
        f"print(module_source({training(SWIN)!r}), end='')"
    )
    other_order = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program], env=other_order, capture_output=True, text=True, check=True)
    assert other.stdout == module_source(training(SWIN))


@pytest.mark.parametrize("name", SPECS)
def test_the_text_is_tidy(name: str) -> None:
    text = module_source(SPECS[name])
    ast.parse(text)
    lines = text.splitlines()
    assert all(line == line.rstrip() and "\t" not in line and len(line) <= 130 for line in lines)
    assert not any(x == y == z == "" for x, y, z in zip(lines, lines[1:], lines[2:], strict=False))
    assert not any(mark in text for mark in ("{{", "{%", "{#"))


def test_what_is_not_used_is_not_there() -> None:
    assert "def dropout" in module_source(DROPOUT)
    assert "philox" not in module_source(VIT)
    assert "tanh" not in module_source(VIT)
    assert "atomic_add" not in module_source(training(VIT))
    assert "atomic_add" in module_source(training(SWIN))
    only_v = KernelSpec("float32", "float32", 8, 8, needs_grad=(False, False, True))
    assert "def backward_q" not in module_source(only_v)
    assert "dk0" not in module_source(only_v)


def test_source_names_target_and_block_sizes() -> None:
    text = source(VIT, target="gfx942", queries=197, keys=197)
    assert text.startswith("# for gfx942, 197 queries and 197 keys:\n#     forward[...]")
    assert "RESIDENT=True" in text
    assert module_source(VIT) in text
    with pytest.raises(ValueError, match="unknown GPU 'sm_1', expected one of sm_80"):
        source(VIT, target="sm_1")


# --- nothing is written twice -----------------------------------------------------------------------------------------


def functions(name: str) -> dict[str, list[str]]:
    """Function -> its lines, without those that say nothing (brackets, blank ones)."""
    text = module_source(SPECS[name])
    lines = text.splitlines()
    return {
        node.name: [x.strip() for x in lines[node.lineno : node.end_lineno] if len(x.strip(" ()[],")) > 3]
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def longest_run(x: list[str], y: list[str]) -> list[str]:
    match = difflib.SequenceMatcher(None, x, y, autojunk=False).find_longest_match()
    return x[match.a : match.a + match.size]


@pytest.mark.parametrize(("forward", "backward"), [("vit", "vit_backward"), ("swin", "swin_backward")])
def test_forward_and_backward_share_functions_and_copy_none(forward: str, backward: str) -> None:
    ours, theirs = functions(forward), functions(backward)
    shared = ours.keys() & theirs.keys()
    assert {"score_tile", "load_part", "kept_exponentials", "key_tile", "place"} <= shared
    assert all(ours[x] == theirs[x] for x in shared)  # from one template part
    every = ours | theirs
    for x, y in itertools.combinations(every, 2):
        run = longest_run(every[x], every[y])
        assert len(run) < LONGEST_RUN, f"{x} and {y} share {len(run)} lines:\n" + "\n".join(run)


def test_templates_do_not_copy_each_other() -> None:
    texts = {
        path.name: [x.strip() for x in path.read_text().splitlines() if len(x.strip(" ()[],{}%")) > 8]
        for path in TEMPLATES.glob("*.jinja")
    }
    assert len(texts) > 8
    for x, y in itertools.combinations(texts, 2):
        assert len(longest_run(texts[x], texts[y])) < 6, (x, y)


# --- what the text is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "widths"),
    [(1, [16]), (16, [16]), (24, [32]), (48, [32, 16]), (64, [64]), (72, [64, 16]), (80, [64, 16]), (96, [64, 32]),
     (112, [64, 32, 16]), (120, [128]), (200, [128, 64, 16]), (256, [256])],
)  # fmt: skip
def test_heads_are_cut_into_few_powers_of_two(features: int, widths: list[int]) -> None:
    assert [part.width for part in parts(features)] == widths
    assert [part.first for part in parts(features)] == [sum(widths[:n]) for n in range(len(widths))]


@pytest.mark.parametrize(("features", "widths"), [(256, [64] * 4), (200, [64, 64, 64, 16]), (130, [64, 64, 16])])
def test_wide_float32_heads_are_split_in_64(features: int, widths: list[int]) -> None:
    spec = KernelSpec("float32", "float32", features, 64)
    assert [part.width for part in parts(features, widest_part(spec))] == widths
    assert "again = cols + tl.minimum(start, 0)" in module_source(training(spec))
    half = KernelSpec("bfloat16", "bfloat16", features, 64)
    assert parts(features, widest_part(half)) == parts(features)
    assert "again =" not in module_source(training(half))


@pytest.mark.parametrize(
    ("score", "keys", "rows"),
    [
        ("where(le(j, i), s, -oo)", [("last", "high")], [("first", "low")]),
        ("where(gt(j, i), -oo, s)", [("last", "high")], [("first", "low")]),
        ("where(lt(j, i + n0), s, -oo)", [("last", "high + n0 - 1")], [("first", "low - n0 + 1")]),
        ("where(logical_and(le(j, i + 3), gt(j, i - 9)), s, -oo)",
         [("last", "high + 3"), ("first", "low - 8")], [("first", "low - 3"), ("last", "high + 8")]),
        ("where(logical_not(lt(i, j)), tanh(s), -oo)", [("last", "high")], [("first", "low")]),
        ("where(lt(j, 5), s, -oo)", [("last", "4")], []),
        ("s + where(le(j, i), 0.0, -oo)", [], []),
        ("where(le(j, i), s, -1e9)", [], []),
        ("where(logical_or(le(j, i), lt(j, 4)), s, -oo)", [], []),
        ("where(le(j, 2*i), s, -oo)", [("last", "2*high")], []),
        ("where(le(j*j, i), s, -oo)", [], []),
        ("where(le(c0[j], i), s, -oo)", [], []),
        ("where(le(j, b), s, -oo)", [], []),
    ],
)  # fmt: skip
def test_tiles_are_skipped_exactly_where_the_mask_proves_it(
    score: str, keys: list[tuple[str, str]], rows: list[tuple[str, str]]
) -> None:
    names = {"low": bounds.low, "high": bounds.high, "n0": language.size_symbol(0)}

    def read(found: list[tuple[str, str]]) -> set[tuple[str, sympy.Expr]]:
        return {(side, sympy.sympify(text, locals=names)) for side, text in found}

    expression = language.parse(score)
    assert set(bounds.key_bounds(expression)) == read(keys)
    assert set(bounds.row_bounds(expression)) == read(rows)


def test_causal_kernels_end_at_the_diagonal() -> None:
    assert "last = tl.minimum(last, last_row + 1)" in module_source(CAUSAL)
    assert "first = tl.maximum(first, first_key)" in module_source(training(CAUSAL))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("keys", [1, 197, 257, 4096])
@pytest.mark.parametrize("queries", [1, 1024])
@pytest.mark.parametrize("hip", [False, True], ids=["NVIDIA", "AMD"])
def test_candidates_start_with_the_default_and_multiply_scores_alike(
    part: str, queries: int, keys: int, hip: bool
) -> None:
    for forward in (VIT, VIT32, SOFTCAP, DOUBLE):
        spec = forward if part == "forward" else training(forward)
        found = candidates(spec, part, queries, keys, hip)
        assert found[0] == default(spec, part, queries, keys, hip)
        assert len(set(found)) == len(found) > 3
        assert all(x.kind == "streaming" or x.cols >= keys for x in found)
        assert {family(x, hip) for x in found} == {family(default(forward, "forward", queries, keys, hip), hip)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "without 'rows'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"kind": "round"}, "kind 'round', expected one of resident, streaming"),
        ({"cols": 48}, "cols = 48, expected a power of two"),
        ({"warps": True}, "warps = True, expected a positive integer"),
        ({"stages": 0}, "stages = 0, expected a positive integer"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_block_sizes_name_the_bad_field(change: dict[str, object], message: str) -> None:
    blocks = Blocks("streaming", 64, 32, 4, 2)
    values = {name: x for name, x in (blocks.to_dict() | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        Blocks.from_dict(values)
    assert Blocks.from_dict(blocks.to_dict()) == blocks
