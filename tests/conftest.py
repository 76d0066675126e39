"""What every test gets: a torchvision that imports, the same random numbers each time, a compiler with no memory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import hypothesis
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchvision_cpu  # noqa: F401 - examples/torchvision_cpu.py, before anything imports torchvision

hypothesis.settings.register_profile("kvt", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("kvt")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselected, not skipped: tests marked gpu where there is no GPU, and tests marked slow unless there is a -m."""
    unwanted = [] if torch.cuda.is_available() else ["gpu"]
    unwanted += [] if config.option.markexpr else ["slow"]
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
