"""A spec goes to the processes that compile and measure for the tuner."""

from __future__ import annotations

import pickle

from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec


def test_a_spec_that_was_used_can_be_sent_to_another_process() -> None:
    spec = KernelSpec("float32", "float32", 8, 8, score="0.5*s + c0[i, j]", captured=(CapturedSpec("float32", 2),))
    used = (spec.score_expression, spec.weight_expression, spec.types, spec.score_loads)
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert (again.score_expression, again.weight_expression) == used[:2]
