"""Results on disk: damaged files, shipped results, one file of many, and many processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning import CANDIDATES, DEFAULT, KEY, Block, FakeClock, speed, tuner_of

from kvt_compile.kernels.tune import Key
from kvt_compile.kernels.tune.entry import Entry, Measured
from kvt_compile.kernels.tune.lock import locked
from kvt_compile.kernels.tune.store import SHIPPED, Store, read_into
from kvt_compile.kernels.tune.transfer import BadFile, parse, write
from kvt_compile.kernels.tune.tuner import Effort

ENTRY = Entry(KEY, {"rows": 128}, (Measured({"rows": 128}, 0.5),), date="2026-01-02")
OTHER = Key.from_dict(KEY.to_dict() | {"part": "backward_q"})
# real processes, but without importing torch again in each
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tune", tmp_path / "shipped")


def text(**changes: Any) -> str:
    return json.dumps(ENTRY.to_dict() | changes)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_round_trip(store: Store) -> None:
    path = store.save(ENTRY)
    assert store.read(path) == ENTRY
    assert store.load(KEY) == ENTRY
    assert store.load(OTHER) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary stays


DAMAGED = {
    "empty": "",
    "cut off": text()[:-40],
    "no JSON object": "[]",
    "deeply nested": "[" * 100_000,
    "not text": "\udcff",
    "another format": text(format=2),
    "no key": json.dumps({"format": 1, "winner": {}}),
    "a wrong type": text(winner=[32]),
    "a wrong time": text(measured=[{"candidate": {}, "milliseconds": "fast"}]),
    "another key": text(key=OTHER.to_dict()),
    "a winner that is none": text(winner={"rows": "many"}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_warns_by_name_and_is_replaced(store: Store, damage: str) -> None:
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGED[damage].encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning) as warned:
        assert tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed) == DEFAULT
    assert [str(path) in str(w.message) and "ignored" in str(w.message) for w in warned] == [True]
    # the warning is not repeated, and tuning replaces the file
    assert tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)
    assert tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed) == Block(32)


def test_a_damaged_file_costs_its_own_result_only(store: Store) -> None:
    store.save(ENTRY)
    store.path(OTHER).write_text("{")
    with pytest.warns(RuntimeWarning, match="backward_q"):
        assert [entry.key for _, entry in store.entries()] == [KEY]
    assert len(store.files()) == 2


# --- shipped results --------------------------------------------------------------------------------------------------


def test_a_shipped_result_is_used_until_the_user_has_one(store: Store) -> None:
    store.shipped.mkdir()
    write(store.shipped / "nvidia-test.json", [ENTRY])
    assert tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed) == Block(128)
    assert tuner_of(store)[0].pick(OTHER, CANDIDATES, DEFAULT, speed) == DEFAULT
    store.save(Entry(KEY, {"rows": 16}))
    assert tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, speed) == Block(16)


def test_a_damaged_shipped_file_leaves_the_others(store: Store) -> None:
    store.shipped.mkdir()
    write(store.shipped / "a.json", [ENTRY])
    (store.shipped / "b.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match=r"b\.json does not hold tuning results"):
        assert store.load(KEY) == ENTRY


def test_what_the_package_ships_can_be_read() -> None:
    assert SHIPPED.is_dir()
    for path in SHIPPED.glob("*.json"):
        assert parse(path), path


# --- one file of many results -----------------------------------------------------------------------------------------


def test_export_and_import(store: Store, tmp_path: Path) -> None:
    store.save(ENTRY)
    store.save(Entry(OTHER, {"rows": 16}))
    file = tmp_path / "results.json"
    assert write(file, (entry for _, entry in store.entries())) == 2
    there = Store(tmp_path / "there", tmp_path)
    there.save(Entry(OTHER, {"rows": 64}))
    assert read_into(file, there) == (1, 1)
    assert {entry.key.part: entry.winner["rows"] for _, entry in there.entries()} == {"forward": 128, "backward_q": 64}
    assert read_into(file, there, replace=True) == (2, 0)
    assert {entry.key.part: entry.winner["rows"] for _, entry in there.entries()} == {"forward": 128, "backward_q": 16}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "does not hold tuning results: .*Expecting value"),
        ('{"format": 1}', "has no field 'results'"),
        ('{"format": 9, "results": []}', "has format 9, expected 1"),
        (
            json.dumps({"format": 1, "results": [ENTRY.to_dict(), {"format": 1}]}),
            "result 2 of 2: .* has no field 'key'",
        ),
    ],
    ids=["missing", "empty", "no results", "another format", "one bad result"],
)
def test_a_bad_file_adds_nothing(store: Store, tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadFile, match=message) as error:
        read_into(file, store)
    assert str(file) in str(error.value)
    assert store.files() == []


# --- many processes ---------------------------------------------------------------------------------------------------


def start(work: Callable[..., None], *args: Any) -> Any:
    process = FORK.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for 30 s"
        time.sleep(0.005)


def tune_and_tell(store: Store, log: Path, told: Path, gate: Any) -> None:
    def run(candidate: Block) -> Callable[[], float]:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {candidate.rows}\n")
        time.sleep(0.02)
        return speed(candidate)

    gate.wait(30)
    picked = tuner_of(store)[0].pick(KEY, CANDIDATES, DEFAULT, run, "on", FakeClock())
    (told / str(os.getpid())).write_text(str(picked.rows))


def test_of_many_processes_one_measures_and_all_use_its_result(store: Store, tmp_path: Path) -> None:
    log, told = tmp_path / "log", tmp_path / "told"
    told.mkdir()
    gate = FORK.Barrier(4)
    processes = [start(tune_and_tell, store, log, told, gate) for _ in range(4)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.read_text() for path in told.iterdir()] == ["32"] * 4
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 1
    assert len(lines) == len(CANDIDATES)


def hold(path: Path, ready: Path) -> None:
    with locked(path, 0) as held:
        ready.write_text(str(held))
        time.sleep(60)


@pytest.fixture
def holder(store: Store, tmp_path: Path) -> Any:
    """Another process that holds the lock of KEY's GPU."""
    ready = tmp_path / "ready"
    process = start(hold, store.lock(KEY), ready)
    wait_for(lambda: ready.exists() and ready.read_text() == "True")
    yield process
    process.kill()
    process.join()


def test_who_waits_too_long_uses_the_default(store: Store, holder: Any, caplog: pytest.LogCaptureFixture) -> None:
    mine, steps = tuner_of(store, effort=Effort(wait_s=0.1))
    start = time.monotonic()
    assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == DEFAULT
    assert time.monotonic() - start < 10
    assert steps == []
    assert "waiting up to 0 s for another process" in caplog.text
    assert "goes on with default block sizes" in caplog.text
    # and does not wait again at the next launch
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert mine.pick(KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == DEFAULT


def test_the_lock_of_a_killed_process_is_free(store: Store, holder: Any) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert tuner_of(store, effort=Effort(wait_s=5))[0].pick(
        KEY, CANDIDATES, DEFAULT, speed, "on", FakeClock()
    ) == Block(32)


def test_another_gpu_has_another_lock(store: Store, holder: Any) -> None:
    other = Key.from_dict(KEY.to_dict() | {"device": "AMD Test"})
    mine, _ = tuner_of(store, effort=Effort(wait_s=0))
    assert mine.pick(other, CANDIDATES, DEFAULT, speed, "on", FakeClock()) == Block(32)


def test_a_lock_excludes_within_a_process_too(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", 0) as first, locked(tmp_path / "lock", 0.02) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / "lock", 0) as again:
        assert again


def test_where_nothing_can_be_locked_everybody_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "lock", 0) as held:
        assert held


def save_often(store: Store, rows: int) -> None:
    for _ in range(150):
        store.save(Entry(KEY, {"rows": rows}, tuple(Measured({"rows": n}, 1.0) for n in range(200))))


def test_a_reader_never_sees_half_a_file(store: Store) -> None:
    store.save(ENTRY)
    writers = [start(save_often, store, rows) for rows in (16, 32)]
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged file
        while any(process.is_alive() for process in writers):
            entry = store.read(store.path(KEY))
            assert entry is not None
            seen.add(entry.winner["rows"])
    assert seen >= {16, 32}
    assert [p.name for p in store.path(KEY).parent.iterdir()] == [store.path(KEY).name]
