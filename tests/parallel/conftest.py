"""Processes for the tests of this folder: one set for each number of ranks, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from ranks import Ranks

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All in one process of `pytest -n`: others would start sets of their own."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group("ranks"))
            if not torch.distributed.is_available():
                item.add_marker(pytest.mark.skip(reason="this torch has no torch.distributed"))


@pytest.fixture(scope="session")
def _sets() -> Iterator[dict[int, Ranks]]:
    sets: dict[int, Ranks] = {}
    yield sets
    for ranks in sets.values():
        ranks.close()


@pytest.fixture
def run(_sets: dict[int, Ranks]) -> Callable[..., list[Any]]:
    """run(world, check, *arguments): the check on every rank; what it returned on each."""

    def on_ranks(world: int, check: Callable[..., Any], *arguments: Any) -> list[Any]:
        if world not in _sets or not _sets[world].alive:
            _sets[world] = Ranks(world)
        return _sets[world].run(check, *arguments)

    return on_ranks
