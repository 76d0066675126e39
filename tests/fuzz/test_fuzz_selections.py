"""Random selections: every lowering against the reference, and random programs under them."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_graphs import Program
from fuzz_programs import positives
from fuzz_selections import cases, check, check_lowering, options
from hypothesis import HealthCheck, Phase, given, settings
from oracles import Case

many = settings(suppress_health_check=list(HealthCheck), database=None, phases=(Phase.generate,), derandomize=True)


@pytest.mark.parametrize("lowering", ["aten", "c"])
def test_lowerings_agree_with_the_reference(lowering: str) -> None:
    ran = 0

    @given(cases())
    @settings(many, max_examples=40)
    def search(case: Case) -> None:
        nonlocal ran
        check_lowering(case, lowering)
        ran += 1

    search()
    assert ran > 10


def test_programs_keep_their_meaning() -> None:
    rewritten = 0

    @given(positives(), options())
    @settings(many, max_examples=50)
    def search(program: Program, drawn: tuple[dict[str, Any], bool]) -> None:
        nonlocal rewritten
        rewritten += check(program, *drawn)

    search()
    assert rewritten > 10
