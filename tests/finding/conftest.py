from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _traced_at_all(request: pytest.FixtureRequest) -> None:
    if "quantile" in request.node.name and torch.__version__ < (2, 13):
        pytest.skip(f"torch {torch.__version__} compares the values of a quantile's number: no trace goes through it")
