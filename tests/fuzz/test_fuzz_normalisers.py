"""Random rows between two products: every softmax is found, nothing else is fused, and the meaning stays."""

from __future__ import annotations

from fuzz_normalisers import Normalised, normalised
from fuzz_rows import check
from hypothesis import HealthCheck, Phase, given, settings

many = settings(suppress_health_check=list(HealthCheck), database=None, phases=(Phase.generate,), derandomize=True)


def test_rows_in_any_normalisation() -> None:
    outcomes: list[str] = []

    @given(normalised())
    @settings(many, max_examples=150)
    def run(drawn: Normalised) -> None:
        outcomes.append(check(drawn))

    run()
    missed = [x for x in outcomes if x not in ("fused", "none")]
    assert len(missed) <= 0.1 * len(outcomes), "softmaxes that were not fused:\n" + "\n".join(missed)
