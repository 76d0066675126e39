"""`kvt doctor`: what it says about this machine, and that it notices what does not work."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from cli_result import Result
from torch._inductor import compile_fx

import kvt_compile.doctor
from kvt_compile import torch_versions
from kvt_compile.doctor import Check, Diagnosis, diagnosis, examine, machine, selftest
from kvt_compile.kernels import lowerings
from kvt_compile.kernels.c import launch, toolchain
from kvt_compile.kernels.c import lowering as c_lowering
from kvt_compile.kernels.op.call import AttentionCall
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.warn import warn_once


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    return examine()


@pytest.fixture
def _no_memory_of_kernels() -> Iterator[None]:
    """The C lowering as in a fresh process, before and after."""
    settings = c_lowering.LOWERING._settings

    def forget() -> None:
        c_lowering.LOWERING._settings = settings
        for cached in (lowerings.choose, launch.kernel, c_lowering.warn_once):
            cached.cache_clear()
        toolchain.forget()

    forget()
    c_lowering.LOWERING._settings = None
    yield
    forget()


def statuses(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


class Wrong(aten.AtenLowering):
    """Computes well, but of other values."""

    name = "wrong"

    def forward(self, call: AttentionCall) -> Any:
        return super().forward(replace(call, v=call.v * 1.001))


class Raises(aten.AtenLowering):
    name = "raises"

    def backward(self, *arguments: Any) -> Any:
        raise MemoryError("no room\nat all")


class KeepsMore(aten.AtenLowering):
    name = "keeps-more"

    def softmax(self, scores: Any, dim: int, topk: int, dtype: Any, tolerance: float = 0.0) -> Any:
        return super().softmax(scores, dim, topk + 1, dtype)


class TestDiagnosis:
    def test_this_machine(self, healthy: Diagnosis) -> None:
        found = statuses(healthy)
        assert {"torch", "backend", "C compiler", "CPU", "GPU", "cache"} <= set(found)
        assert {f"self-test {name} on cpu" for name in lowerings.names() if name != "auto"} <= set(found)
        assert healthy.healthy, [check for check in healthy.checks if check.status == "failed"]
        assert healthy.chosen["cpu"] in lowerings.names()

    def test_compilations_that_torch_drops_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(diagnosis, "_lowering", lambda name, device: Check(name, "ok", ""))
        assert "compilation" not in statuses(examine())
        monkeypatch.setattr(diagnosis, "told", lambda: ["torch does not compile under vmap"])
        with torch._dynamo.config.patch(disable=True):
            found = [check.text for check in examine().checks if check.name == "compilation"]
        assert len(found) == 2
        assert "switched off" in found[0]

    def test_errors_are_measured(self, healthy: Diagnosis) -> None:
        tested = [check for check in healthy.checks if check.error is not None]
        assert tested
        assert all(0 < check.error < 1e-5 for check in tested if check.error is not None)

    def test_is_json(self, healthy: Diagnosis) -> None:
        data = json.loads(json.dumps(healthy.to_dict(), allow_nan=False))
        assert (data["healthy"], data["versions"]["torch"]) == (True, torch.__version__)
        assert len(data["checks"]) == len(healthy.checks)

    @pytest.mark.parametrize(
        ("lowering", "says"),
        [
            (Wrong(), r"its error \d.*e-0\d is above the budget"),
            (Raises(), "MemoryError: no room$"),
            (KeepsMore(), "it keeps other keys than the reference"),
        ],
        ids=lambda x: getattr(x, "name", ""),
    )
    def test_a_lowering_that_does_not_work(self, lowering: Any, says: str) -> None:
        undo = lowerings.register(lowering.name, lowering)
        try:
            check = diagnosis._lowering(lowering.name, "cpu")
        finally:
            undo()
        assert check.status == "failed"
        assert re.search(says, check.text)
        assert check.remedy
        json.dumps(Diagnosis((check,), {}).to_dict(), allow_nan=False)

    def test_a_lowering_that_does_not_import(self) -> None:
        undo = lowerings.register("gone", "kvt_compile.nowhere:LOWERING")
        try:
            check = diagnosis._lowering("gone", "cpu")
        finally:
            undo()
        assert (check.status, "ModuleNotFoundError" in check.text) == ("failed", True)

    def test_a_lowering_for_another_device_is_a_note(self) -> None:
        check = diagnosis._lowering("c", "cuda")
        assert (check.status, check.text) == ("note", "not here: it runs on cpu, not on cuda")

    def test_torch_of_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        newer = f"{torch_versions.NEWEST[0]}.{torch_versions.NEWEST[1] + 1}.0a0+git1"
        said = {"2.10.1": "failed", "2.11.0+cpu": "ok", "2.13.1": "ok", "2.14.1": "ok", newer: "note", "3.0.0": "note"}
        for name, status in said.items():
            monkeypatch.setattr(torch, "__version__", name)
            found = Diagnosis(tuple(diagnosis._software()), {})
            assert statuses(found)["torch"] == status, name
            assert found.healthy == (status != "failed")

    def test_a_torch_that_nobody_tried_warns_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        warn_once.cache_clear()
        monkeypatch.setattr(torch_versions, "NEWEST", (2, 10))
        monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **_: graph)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for width in (2, 3):
                torch.compile(torch.nn.Linear(width, 1), backend="kvt")(torch.zeros(1, width))
        assert sum("has been tried on torch" in str(one.message) for one in said) == 1

    def test_neighbour_one_that_was_tried_is_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        warn_once.cache_clear()
        monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **_: graph)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*has been tried on torch.*")
            torch.compile(torch.nn.Linear(4, 1), backend="kvt")(torch.zeros(1, 4))

    def test_a_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "entry_points", lambda **_: ())
        assert statuses(Diagnosis(tuple(diagnosis._software()), {}))["backend"] == "failed"

    @pytest.mark.usefixtures("_no_memory_of_kernels")
    def test_without_a_compiler_it_is_slower_and_healthy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "no-such-compiler")
        with pytest.warns(RuntimeWarning, match="ATen operators"):
            found = examine()
        assert statuses(found)["C compiler"] == statuses(found)["self-test c on cpu"] == "note"
        assert found.chosen["cpu"] == "aten"
        assert found.healthy
        (choice,) = (check for check in found.checks if check.name == "lowering on cpu")
        assert "no C compiler" in choice.text
        assert toolchain.INSTALL_HINT not in choice.text

    @pytest.mark.usefixtures("_no_memory_of_kernels")
    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CC", "false")
        monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path))
        result = selftest.self_test("c", "cpu")
        assert not result.passed
        assert "could not build a C kernel" in result.said

    def test_a_cache_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "file" / "cache"))
        check = diagnosis._cache()
        assert check.status == "failed"
        assert "KVT_CACHE_DIR" in check.remedy

    def test_the_cache_is_measured_and_left_as_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "kernel.so").write_bytes(b"x" * 300)
        monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path))
        found = machine.cache()
        assert (found.writable, found.files, found.size) == (True, 1, 300)
        assert len(list(tmp_path.rglob("*"))) == 2


class TestCommand:
    def test_list(self, kvt: Callable[..., Result], healthy: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kvt_compile.doctor, "examine", lambda: healthy)
        result = kvt("doctor")
        assert result.code == 0
        assert "Everything that is promised works." in result.out
        assert len(result.out.splitlines()) >= len(healthy.checks)

    def test_failure_is_exit_code_1(self, kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
        ill = Diagnosis((diagnosis.Check("cache", "failed", "full", "empty it", float("nan")),), {})
        monkeypatch.setattr(kvt_compile.doctor, "examine", lambda: ill)
        result = kvt("doctor")
        assert (result.code, result.out.splitlines()[-1]) == (1, "cache: not working")
        result = kvt("doctor", "--json")
        assert result.code == 1
        assert json.loads(result.out)["checks"][0]["error"] is None
