"""What every test gets: a torchvision that imports, the same random numbers each time, a compiler with no memory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from cli_result import Result

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests of faults did, in numbers (of one process: without -n)."""
    if counts := getattr(sys.modules.get("faults"), "COUNTS", None):
        terminalreporter.write_line("faults: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


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
