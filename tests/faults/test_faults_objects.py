"""What is in the cache is loaded only where nobody else can have written it, and only what was written there."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import (  # noqa: F401 - fresh_lowering serves every test here
    COUNTS,
    OTHER_USER,
    SPEC,
    become,
    everybodys_folder,
    fresh_lowering,
    in_fork,
    mode,
    needs_root,
    softmax,
    three_calls,
)  # fmt: skip

from kvt_compile.kernels.c import CLowering, Settings, objects, source
from kvt_compile.kernels.c.toolchain import Compiler, find_compiler
from kvt_compile.kernels.disk.trust import UntrustedError, own_folder, read_own


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "home").mkdir()
    return Settings(tmp_path / "home" / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was built, by folder."""
    made: list[Path] = []
    original = Compiler.build

    def spy(self: Compiler, text: Path, output: Path, *rest: object) -> None:
        made.append(output.parent.parent)
        original(self, text, output, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Compiler, "build", spy)
    return made


@pytest.fixture
def kept(settings: Settings, builds: list[Path]) -> Path:
    """An object in the cache, as another process finds it."""
    assert in_fork(lambda: softmax(CLowering(settings)))
    (path,) = (settings.cache / "c").glob("*.so")
    return path


# --- whose it is ------------------------------------------------------------------------------------------------------

OPENED: dict[str, Callable[[Path], None]] = {
    "the object, to everybody": lambda path: path.chmod(0o666),
    "the object, to its group": lambda path: path.chmod(0o660),
    "its folder, to everybody": lambda path: path.parent.chmod(0o777),
    "its folder, to everybody, sticky": lambda path: path.parent.chmod(0o1777),
    "its folder, to its group": lambda path: path.parent.chmod(0o770),
    "the cache, to everybody": lambda path: path.parent.parent.chmod(0o707),
    "the folder above, to everybody": lambda path: path.parent.parent.parent.chmod(0o777),
    "the object, of another user": lambda path: os.chown(path, OTHER_USER, -1),
    "its folder, of another user": lambda path: os.chown(path.parent, OTHER_USER, -1),
    "the folder above, of another user": lambda path: os.chown(path.parent.parent.parent, OTHER_USER, -1),
}


@pytest.mark.parametrize("opened", OPENED)
def test_what_others_can_write_is_not_loaded(kept: Path, settings: Settings, builds: list[Path], opened: str) -> None:
    if "another user" in opened:
        needs_root()
    OPENED[opened](kept)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert softmax(CLowering(settings))
        assert softmax(CLowering(settings))
    COUNTS["planted objects"] += 1
    assert len(builds) == 1
    if opened.startswith("the object"):
        assert (caught, builds[0], mode(kept)) == ([], kept.parent, 0o600)
    else:
        assert builds[0] != kept.parent
        assert len(caught) == 1
        assert any(word in str(caught[0].message) for word in ("can be written by", "belongs to"))


FINE: dict[str, Callable[[Path], None]] = {
    "read by everybody": lambda path: [x.chmod(0o755) for x in (path, path.parent, path.parent.parent)],  # type: ignore
    "read-only": lambda path: [x.chmod(0o500) for x in (path, path.parent)],  # type: ignore[dict-item]
    "in a sticky folder": lambda path: path.parent.parent.parent.chmod(0o1777),
}


@pytest.mark.parametrize("how", FINE)
def test_what_only_the_user_can_write_is(kept: Path, settings: Settings, builds: list[Path], how: str) -> None:
    FINE[how](kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax(CLowering(settings))
    assert builds == []


def test_an_object_planted_by_another_user_does_not_run(builds: list[Path]) -> None:
    """In a cache that was made for everybody, under the right name and with the right digest."""
    needs_root()
    with everybodys_folder() as folder:
        cache = folder / "cache"
        (cache / "c").mkdir(parents=True)
        for made in (cache, cache / "c"):
            made.chmod(0o777)

        def plant() -> str:
            become(OTHER_USER)
            text = folder / "planted.c"
            text.write_text(
                source(SPEC) + f"\n#include <stdio.h>\n__attribute__((constructor)) static void planted(void) "
                f'{{ fclose(fopen("{folder}/ran", "w")); }}\n'
            )
            compiler = find_compiler(None, "native")
            compiler.build(text, folder / "planted.so")
            name = objects.name_of(source(SPEC), compiler)
            (cache / "c" / f"{name}.so").write_bytes(objects.seal(name, (folder / "planted.so").read_bytes()))
            return name

        name = in_fork(plant, TMPDIR=str(folder))
        assert objects.unsealed(name, (cache / "c" / f"{name}.so").read_bytes()) is not None
        found = three_calls(KVT_CACHE_DIR=str(cache))
        assert (found["right"], found["built"], len(found["warnings"])) == (True, True, 1), found
        assert not (folder / "ran").exists()
        # nor as the user whose home is the folder that root owns
        as_user = three_calls(lambda: become(54321), KVT_CACHE_DIR=str(cache), TMPDIR=str(folder))
        assert (as_user["right"], as_user["built"]) == (True, True), as_user
        assert not (folder / "ran").exists()


def test_a_cache_that_root_keeps_serves_everybody() -> None:
    """The way to share one: it belongs to root, and others may only read it."""
    needs_root()
    with everybodys_folder() as folder:
        (folder / "cache").mkdir(0o755)
        assert three_calls(KVT_CACHE_DIR=str(folder / "cache"))["built"]
        for path in (folder / "cache").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "cache").chmod(0o755)
        before = sorted(path.name for path in (folder / "cache" / "c").iterdir())
        found = three_calls(lambda: become(54321), KVT_CACHE_DIR=str(folder / "cache"), TMPDIR=str(folder))
        assert (found["built"], found["warnings"]) == (True, []), found
        assert sorted(path.name for path in (folder / "cache" / "c").iterdir()) == before


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o777], ids=oct)
def test_everything_is_written_for_the_user_alone(tmp_path: Path, umask: int) -> None:
    assert three_calls(lambda: os.umask(umask), KVT_CACHE_DIR=str(tmp_path / "a" / "cache"))["built"]  # type: ignore
    made = [tmp_path / "a", tmp_path / "a" / "cache", *(tmp_path / "a" / "cache").rglob("*")]
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file()} == {0o600}
    assert len(made) == 5


@pytest.mark.parametrize("umask", [0o777], ids=oct)
def test_also_by_a_user_who_is_not_root(umask: int) -> None:
    needs_root()
    with everybodys_folder() as folder:

        def other() -> None:
            become(54321)
            os.umask(umask)

        found = three_calls(other, KVT_CACHE_DIR=str(folder / "cache"), TMPDIR=str(folder))
        assert (found["built"], found["warnings"]) == (True, []), found
        assert {mode(x) for x in (folder / "cache").rglob("*") if x.is_file()} == {0o600}


# --- what it is -------------------------------------------------------------------------------------------------------


def another_machine(path: Path) -> None:
    """An object with the right digest for a machine that this is not."""
    body = bytearray(objects.unsealed(path.stem, path.read_bytes()) or b"")
    body[18:20] = b"\xf3\x00" if body[18:20] != b"\xf3\x00" else b"\x3e\x00"  # e_machine: RISC-V
    path.unlink()
    path.write_bytes(objects.seal(path.stem, bytes(body)))


def another_kernel(path: Path) -> None:
    """A kernel of ours under the name of this one."""
    other = path.with_name("0123.so")
    compiler = find_compiler(None, "native")
    text = path.with_name("other.c")
    text.write_text("int kvt_other(void) { return 0; }\n")
    compiler.build(text, other)
    path.unlink()
    path.write_bytes(objects.seal(path.stem, other.read_bytes()))
    other.unlink()
    text.unlink()


def renamed(path: Path) -> None:
    body = objects.unsealed(path.stem, path.read_bytes())
    assert body is not None
    path.unlink()
    path.write_bytes(objects.seal("another", body))


def a_link(path: Path) -> None:
    path.rename(path.with_name("there"))
    path.symlink_to(path.with_name("there"))


def a_ring(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


REPLACED: dict[str, Callable[[Path], None]] = {
    "for another machine": another_machine,
    "without its functions": another_kernel,
    "of another name": renamed,
    "a link": a_link,
    "a link to itself": a_ring,
    "a pipe": a_pipe,
    "a socket's place": lambda path: os.mknod(path.with_name("x"), 0o140600) or os.replace(path.with_name("x"), path),  # type: ignore
    "as large as a disk": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("how", REPLACED)
def test_what_was_not_written_there_is_built_again(
    kept: Path, settings: Settings, builds: list[Path], how: str
) -> None:
    REPLACED[how](kept)
    builds.clear()
    kept.parent.chmod(0o700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax(CLowering(settings))
    COUNTS["damaged objects"] += 1
    assert builds == [kept.parent]
    assert objects.is_whole(kept)


def test_a_folder_in_its_place_sends_it_elsewhere(kept: Path, settings: Settings) -> None:
    kept.unlink()
    kept.mkdir()
    lowering = CLowering(settings)
    with pytest.warns(RuntimeWarning, match="cannot keep built kernels"):
        assert softmax(lowering)
    assert lowering.built(SPEC)


def test_a_folder_that_loads_nothing_is_replaced_by_a_temporary_one(
    settings: Settings, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = objects.ctypes.CDLL

    def refuse(name: str) -> object:
        if name.startswith(str(settings.cache)):
            raise OSError(f"{name}: failed to map segment from shared object: Operation not permitted")
        return original(name)

    monkeypatch.setattr(objects.ctypes, "CDLL", refuse)
    lowering = CLowering(settings)
    with pytest.warns(RuntimeWarning, match=r"(?s)failed to map.*noexec") as caught:
        assert all([softmax(lowering) for _ in range(3)])
    assert (len(caught), len(builds)) == (1, 2)
    assert lowering.built(SPEC)


def test_nowhere_to_load_from_leaves_aten(
    settings: Settings, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> object:
        raise OSError(f"{name}: cannot map")

    monkeypatch.setattr(objects.ctypes, "CDLL", refuse)
    lowering = CLowering(settings)
    with pytest.warns(RuntimeWarning, match="ATen operators") as caught:
        assert all([softmax(lowering) for _ in range(3)])
    assert (len(caught), len(builds)) == (1, 2)


# --- the check itself -------------------------------------------------------------------------------------------------


def test_links_in_a_path_are_resolved_before_it_is_judged(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "mine").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "mine")
    with pytest.raises(UntrustedError, match="open can be written by everybody"):
        own_folder(tmp_path / "link")
    (tmp_path / "open").chmod(0o755)
    assert own_folder(tmp_path / "link") == (tmp_path / "open" / "mine").resolve()


def test_reading_is_bounded_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "file").chmod(0o600)
    assert read_own(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(UntrustedError, match="100 bytes"):
        read_own(tmp_path / "file", 99)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UntrustedError, match="not a regular file"):
        read_own(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "file", ignore_errors=True)
