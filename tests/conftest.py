"""What every test gets: a torchvision that imports, the same random numbers each time, a compiler with no memory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchvision_cpu  # noqa: F401 - examples/torchvision_cpu.py, before anything imports torchvision

hypothesis.settings.register_profile("kvt", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("kvt")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is a GPU, and are deselected, not skipped, elsewhere."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def kvt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `kvt ARGUMENTS` in this process."""
    from kvt_compile.cli import main

    monkeypatch.delenv("KVT_PRELOAD", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a file adds its folder

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capsys.readouterr()
        return Result(int(end.value.code or 0), printed.out, printed.err)

    return run
