"""Building and keeping C kernels: damage, folders that cannot be written, no compiler (`tests/faults` has the rest)."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from kvt_compile.kernels.c import CLowering, Settings, cache, launch, objects, source, toolchain
from kvt_compile.kernels.c.settings import from_environment
from kvt_compile.kernels.op.spec import KernelSpec, SoftmaxSpec
from kvt_compile.kernels.plain import aten
from kvt_compile.kernels.warn import warn_once

# the row kernel is the quickest to build
SPEC = SoftmaxSpec("float32", "float32")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty cache, and nothing remembered from other tests."""
    launch.kernel.cache_clear()
    warn_once.cache_clear()
    toolchain.forget()
    return Settings(tmp_path / "cache")


def only_object(settings: Settings) -> Path:
    (path,) = (settings.cache / "c").glob("*.so")
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the compiler was asked to build."""
    built: list[Path] = []
    original = toolchain.Compiler.build

    def spy(self: toolchain.Compiler, text: Path, output: Path, *rest: object) -> None:
        built.append(output)
        original(self, text, output, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(toolchain.Compiler, "build", spy)
    return built


def test_a_warm_cache_builds_nothing(settings: Settings, builds: list[Path]) -> None:
    for _ in range(3):
        cache.load(source(SPEC), settings)
    assert len(builds) == 1
    assert only_object(settings).with_suffix(".c").read_text() == source(SPEC)
    assert [x.name for x in (settings.cache / "c").iterdir() if x.name.startswith(".")] == []


def test_layers_that_agree_build_one_kernel(settings: Settings, builds: list[Path]) -> None:
    lowering = CLowering(settings)
    for _ in range(12):
        x = torch.randn(5, 9)
        lowering.softmax_backward(x, lowering.softmax(x, 1, 3, torch.float32), 1, torch.float32)
    assert len(builds) == 1
    forward = KernelSpec("float32", "float32", 4, 4)
    assert source(forward) == source(KernelSpec("float32", "float32", 4, 4, needs_grad=(True, True, False)))


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text"])
def test_a_damaged_object_is_built_again(settings: Settings, builds: list[Path], damage: str) -> None:
    lowering = CLowering(settings)
    x = torch.randn(4, 30)
    expected = lowering.softmax(x, 1, 3, torch.float32)
    path = only_object(settings)
    data = path.read_bytes()
    spoilt = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "flipped": data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
        "text": b"not an object",
    }[damage]
    path.unlink()  # the mapped one must not change under our feet
    path.write_bytes(spoilt)
    launch.kernel.cache_clear()
    assert torch.equal(lowering.softmax(x, 1, 3, torch.float32), expected)
    assert len(builds) == 2
    assert objects.is_whole(path)


def test_a_folder_that_cannot_be_written_is_named_and_replaced(settings: Settings, builds: list[Path]) -> None:
    settings.cache.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=r"(?s)cannot keep built kernels in .*cache.*KVT_CACHE_DIR"):
        cache.load(source(SPEC), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and the temporary folder is used again
        cache.load(source(SPEC), settings)
    assert not builds[0].is_relative_to(settings.cache)
    assert len(builds) == 1


def test_a_full_disk_is_a_folder_that_cannot_be_written(
    settings: Settings, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = objects.write_new

    def full(path: Path, data: bytes) -> None:
        if path.is_relative_to(settings.cache):
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(objects, "write_new", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cache.load(source(SPEC), settings)


def test_no_folder_at_all_leaves_aten(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.cache.write_text("a file")
    cache._temporary_folder.cache_clear()

    def nowhere(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    x = torch.randn(4, 30)
    with pytest.warns(RuntimeWarning, match="(?s)runs k-NN attention with ATen operators.*Read-only"):
        result = CLowering(settings).softmax(x, 1, 3, torch.float32)
    assert torch.equal(result, aten.LOWERING.softmax(x, 1, 3, torch.float32))


def test_no_compiler_says_once_what_to_install_and_leaves_the_node_to_aten(tmp_path: Path) -> None:
    warn_once.cache_clear()
    lowering = CLowering(Settings(tmp_path, compiler="no-such-compiler"))
    with pytest.warns(RuntimeWarning, match=r"no C compiler \(no-such-compiler\).*apt install gcc") as caught:
        reasons = [lowering.supports(SPEC), lowering.supports(KernelSpec("float32", "float32", 8, 8))]
    assert all(reason and "apt install gcc" in reason for reason in reasons)
    assert len(caught) == 1


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(toolchain.BuildError, match="error"):
        cache.load("this is not C", Settings(tmp_path))


def test_an_unknown_instruction_set_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(toolchain.BuildError, match=r"unknown instruction set 'avx1024'.*portable"):
        cache.load(source(SPEC), Settings(tmp_path, target="avx1024"))


def test_where_the_environment_puts_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert from_environment().cache == tmp_path / "kvt_compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert from_environment().cache == Path.home() / ".cache" / "kvt_compile"
    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "own"))
    assert from_environment().cache == tmp_path / "own"
