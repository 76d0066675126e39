"""Random selections of a model's own: whatever is made of them, the model stays what it is."""

from __future__ import annotations

from fuzz_own import CHOICES, check
from hypothesis import given
from hypothesis import strategies as st


@given(CHOICES, st.integers(0, 1 << 20))
def test_a_models_own_selection_stays(choice: dict[str, object], seed: int) -> None:
    check(choice, seed)
