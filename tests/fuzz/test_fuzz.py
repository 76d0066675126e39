"""Thousands of random attention programs: rewritten with the same meaning, or left alone with a reason."""

from __future__ import annotations

import pytest
import torch
from fuzz_check import EXACT, ROUNDED, check, rounding_decides, traced_with_fakes
from fuzz_graphs import Line, Program
from fuzz_modes import check_modes, modes
from fuzz_programs import anything, positives, writes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# the same programs every time: `make fuzz` looks for new ones, and shrinks what it finds (that takes minutes)
many = settings(suppress_health_check=list(HealthCheck), database=None, phases=(Phase.generate,), derandomize=True)
topk = st.integers(1, 4)


@given(positives(), topk)
@settings(many, max_examples=700)
def test_attention_in_any_spelling(program: Program, k: int) -> None:
    check(program, k, reference=k == 2)


@given(writes(), topk)
@settings(many, max_examples=600)
def test_writes_are_followed_or_refused(program: Program, k: int) -> None:
    check(program, k, reference=k == 2)


@given(anything(), topk)
@settings(many, max_examples=700)
def test_near_attention_keeps_its_meaning(program: Program, k: int) -> None:
    check(program, k, reference=k == 2)


@given(positives() | writes(), topk)
@settings(many, max_examples=40)
def test_with_fake_tensors(program: Program, k: int) -> None:
    check(program, k, capture=traced_with_fakes)


def test_modes_transforms_and_hooks_keep_their_meaning() -> None:
    fates: set[str] = set()

    @given(modes(), topk)
    @settings(many, max_examples=8)
    def search(program: Program, k: int) -> None:
        fates.add(check_modes(program, k))

    search()
    assert {"rewritten", "selected"} & fates


@pytest.mark.parametrize(
    ("weights", "decides"),
    [
        ("(t - t.logsumexp(-1, keepdim=True)).exp()", True),
        ("t.softmax(-1)", False),
        ("(t + s).softmax(-1, dtype=torch.float32).double()", True),
        ("(t.clamp(max=9.0) + s).float().softmax(-1).double()", False),
    ],
)
def test_whether_rounding_decides(weights: str, decides: bool) -> None:
    """Few digits are left of the difference of two numbers near 1e9; a softmax subtracts exactly, of numbers of
    float32 that are as far apart as that type has them there."""
    lines = [Line("t = s.masked_fill(self.m, 1e9)"), Line(f"a = {weights}"), Line("out = a @ v")]
    inputs = {"s": torch.ones(1, 4, dtype=torch.float64), "v": torch.arange(4.0, dtype=torch.float64)[:, None]}
    buffers = {"m": torch.tensor([False, False, True, True])}
    program = Program(lines, inputs, buffers=buffers, returns=["out"])
    assert rounding_decides(program, ROUNDED if "double" in weights else EXACT) == decides


def test_the_generator_makes_what_it_says() -> None:
    """Most positives are attention that has to be fused, and every choice is made now and then."""
    plain: list[bool] = []
    tags: set[str] = set()

    @given(positives() | anything())
    @settings(many, max_examples=300)
    def collect(program: Program) -> None:
        plain.append(program.plain)
        tags.update(tag.partition(":")[0] for tag in program.tags)

    collect()
    assert sum(plain) > 20
    assert {"matmul", "einsum", "mulsum", "bmm", "bias", "mask", "layout", "scale", "mixed"} <= tags
