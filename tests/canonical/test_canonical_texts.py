"""Spellings as text, and the canonical values that each comes down to (how to read the files: helpers/texts.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from texts import Case, assert_a_neighbour, assert_means_the_same, cases_of, files, found


@pytest.mark.parametrize("case", cases_of("canonical"), ids=lambda case: case.name)
def test_values_and_outcome(case: Case) -> None:
    assert found(case) == case.found
    assert_means_the_same(case)


@pytest.mark.parametrize("file", files("canonical"), ids=lambda file: file.stem)
def test_each_has_a_neighbour_that_is_not_fused(file: Path) -> None:
    assert_a_neighbour(file)
