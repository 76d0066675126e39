"""Every reader of a file or a text that others may have written: it takes it whole, or refuses it with file, place and
reason; nothing half-written stays, and nothing that a terminal obeys is printed.

    corpus/*    what was once taken wrongly, or fails in a way of its own; random changes start from these too
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_result import Result
from faults import COUNTS, SCALE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tuning import KEY, Block

from kvt_compile.calibration import CalibratedPolicy
from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.facts import Check, SiteCurve
from kvt_compile.cli.errors import UserError
from kvt_compile.cli.topk import parse_topk
from kvt_compile.kernels.c import objects
from kvt_compile.kernels.disk.text import DEPTH, BadTextError, parse_json, shown
from kvt_compile.kernels.language.score import ScoreSyntaxError, parse, to_text
from kvt_compile.kernels.op.spec import KernelSpec
from kvt_compile.kernels.triton.blocks import Blocks
from kvt_compile.kernels.triton.candidates import PARTS, candidates, default, may_run
from kvt_compile.kernels.tune.entry import Entry, Measured
from kvt_compile.kernels.tune.store import Store, read_into
from kvt_compile.kernels.tune.transfer import BadFile, write

CORPUS = Path(__file__).parent / "corpus"
SITE = SiteCurve("blocks.0.attn", 17, 0.5, (0.7, 1.0), (0.1, 0.0), (0.1, 0.0), 0.7, -math.inf)
POLICY = CalibratedPolicy("mass", 0.6, 0.95, (0.5, 1.0), (SITE,), Check(4, 0.99, 0.9, 0.98, 0.01), ((0.5, 0.9, 0.1),))
ENTRY = Entry(KEY, {"rows": 16}, (Measured({"rows": 16}, 0.5),), date="2026-01-02")
OTHER = Entry(type(KEY).from_dict(KEY.to_dict() | {"part": "backward_q"}), {"rows": 32})
RESULTS = {"format": 1, "results": [ENTRY.to_dict(), OTHER.to_dict()]}
DEEP: Any = 1
for _ in range(200):
    DEEP = {"a": DEEP}

slow = settings(max_examples=60 * SCALE)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\x1b[2J", DEEP]),
)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=6
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested data."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    items = items if len(path) < 8 else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@st.composite
def edited(draw: st.DrawFn, data: Any) -> bytes:
    """JSON with some places changed, removed or added to, and sometimes with bytes changed as well."""
    changed = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(0, 3))):
        *above, last = draw(st.sampled_from([x for x in places(changed) if x] or [("format",)]))
        owner = changed
        for key in above:
            owner = owner[key]
        if draw(st.booleans()):
            owner[last] = copy.deepcopy(draw(VALUES))
        else:
            del owner[last]
        if not isinstance(changed, dict | list) or not changed:
            break
    text = json.dumps(changed).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 3)) :]
    return text


def written(data: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(suffix=".json")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return Path(name)


def corpus(kind: str) -> list[bytes]:
    found = [path.read_bytes() for path in sorted(CORPUS.glob(f"{kind}-*"))]
    assert found
    return found


def with_corpus(kind: str) -> Callable[[Any], Any]:
    def add(test: Any) -> Any:
        for data in corpus(kind):
            test = example(data)(test)
        return test

    return add


def printable(text: str) -> bool:
    return shown(text) == text


# --- policies ---------------------------------------------------------------------------------------------------------


def use(policy: CalibratedPolicy) -> None:
    """All that is done with one that was measured."""
    assert printable(str(policy))
    assert policy.met in (True, False)
    assert all(policy[name] == k for name, k in policy.items())
    hash(policy)
    again = written(json.dumps(policy.to_dict()).encode())
    try:
        assert CalibratedPolicy.load(again) == policy
    finally:
        again.unlink()


@slow
@given(edited(POLICY.to_dict()))
@with_corpus("policy")
def test_policies(data: bytes) -> None:
    file = written(data)
    COUNTS["policies"] += 1
    policy = refusal = None
    try:
        policy = CalibratedPolicy.load(file)
    except CalibrationError as error:
        refusal = str(error)
    finally:
        file.unlink()
    if policy is not None:
        use(policy)
    else:
        assert file.name in str(refusal)
        assert printable(str(refusal))


REFUSED = {
    "a k that was not measured": (("sites", 0, "topk"), 0.25, r"sites\[0\]\.topk is 0\.25.*grid"),
    "a curve that is too short": (("sites", 0, "mass"), [0.5], r"sites\[0\]\.mass has 1 entries"),
    "a text for a number": (("check", "cosine"), "high", r"check\.cosine is 'high', expected a number"),
    "a k of half a key": (("grid", 0), 1.5, r"grid\[0\]: topk is 1\.5"),
    "an edit of the summary alone": (("topk", "blocks.0.attn"), 1.0, r"topk says 1\.0 .* edit both"),
    "no keys": (("sites", 0, "keys"), 0, r"sites\[0\]\.keys is 0"),
    "half a surrogate pair": (("sites", 0, "path"), "a\ud800", r"sites\[0\]\.path has half a surrogate pair"),
    "a deep nest": (("sites", 0, "path"), DEEP, "nested"),
    "another budget": (("budget",), "speed", "expected one of mass"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_that_was_edited(tmp_path: Path, name: str) -> None:
    (*above, last), value, says = REFUSED[name]
    data = json.loads(json.dumps(POLICY.to_dict()))
    owner = data
    for key in above:
        owner = owner[key]
    owner[last] = value
    (tmp_path / "policy.json").write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match=rf"(?s)policy\.json cannot be used.*{says}"):
        CalibratedPolicy.load(tmp_path / "policy.json")


def test_a_path_that_a_terminal_obeys_is_escaped() -> None:
    use(CalibratedPolicy(**{**vars(POLICY), "sites": (SiteCurve("a\x1b[2J\u202e", *list(vars(SITE).values())[1:]),)}))


# --- tuning results ---------------------------------------------------------------------------------------------------


@slow
@given(edited(RESULTS))
@with_corpus("results")
def test_imports_are_whole_or_nothing(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, file = Store(folder / "tune", folder / "shipped"), folder / "results.json"
        file.write_bytes(data)
        COUNTS["imports"] += 1
        refusal = ""
        try:
            added, left = read_into(file, store)
        except BadFile as error:
            refusal = str(error)
        if refusal:
            assert "results.json" in refusal
            assert not (folder / "tune").exists()
        else:
            assert left == 0
            assert len(list(store.entries())) == added
            assert write(folder / "again.json", (entry for _, entry in store.entries())) == added
            assert read_into(folder / "again.json", Store(folder / "there", folder / "shipped")) == (added, 0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("date", "\ud800", r"results\[1\]\.date has half a surrogate pair \(\\ud800\) at character 0"),
        ("winner", {"rows": DEEP}, "nested"),
        ("winner", {"rows": [1]}, "result 2 of 2: winner: 'rows' is"),
        ("winner", {"rows": 10**30}, "64 bits"),
        ("measured", [{"candidate": {}, "milliseconds": math.nan}], "NaN"),
        ("key", ENTRY.key.to_dict(), "result 2 of 2: it is for the same kernel"),
    ],
    ids=["surrogate", "deep", "list", "large", "nan", "twice"],
)
def test_a_bad_second_result_keeps_the_first_out(
    kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str, value: Any, says: str
) -> None:
    monkeypatch.setenv("KVT_CACHE_DIR", str(tmp_path / "cache"))
    data = {"format": 1, "results": [ENTRY.to_dict(), OTHER.to_dict() | {field: value}]}
    (tmp_path / "results.json").write_text(json.dumps(data))
    result = kvt("cache", "import", str(tmp_path / "results.json"))
    assert (result.code, result.out) == (2, "")
    assert re.search(says, result.err), result.err
    assert not (tmp_path / "cache").exists()


def test_a_name_that_is_too_long_for_a_file(tmp_path: Path) -> None:
    entry = Entry(type(KEY).from_dict(KEY.to_dict() | {"part": "x" * 5_000, "device": "y" * 5_000}), {"rows": 16})
    store = Store(tmp_path / "tune")
    store.save_all([ENTRY, entry])
    assert {x.key for _, x in store.entries()} == {ENTRY.key, entry.key}


@slow
@given(edited(ENTRY.to_dict()))
@with_corpus("entry")
def test_results_in_the_cache(data: bytes) -> None:
    """A damaged one is ignored with one warning, or is what its file says."""
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / "tune", Path(name))
        path = store.save(ENTRY)
        path.write_bytes(data)
        COUNTS["results in the cache"] += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            entry = store.load(KEY)
        assert entry is None or entry.key == KEY
        assert (entry is None) == (len(caught) == 1)


@slow
@given(VALUES)
def test_block_sizes(data: Any) -> None:
    for kind in (Blocks, Block):
        try:
            made = kind.from_dict(data if isinstance(data, dict) else {"rows": data})
        except (ValueError, TypeError):
            continue
        assert made.to_dict()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("nq", "nk"), [(197, 197), (17, 1025), (1, 1)])
def test_block_sizes_from_a_file_change_no_result(part: str, nq: int, nk: int) -> None:
    """What could have been measured may run; what would select from half a row, or by other scores, may not."""
    spec = KernelSpec("bfloat16", "bfloat16", 64, 64)
    for hip in (False, True):
        assert all(may_run(x, spec, part, nq, nk, hip) for x in candidates(spec, part, nq, nk, hip))
    first = default(spec, part, nq, nk, False)
    others = [
        replace(first, kind="resident", cols=16) if nk > 16 else replace(first, rows=1),
        replace(first, rows=64 if first.rows < 64 else 32),
        replace(first, rows=8),
        replace(first, warps=64),
        replace(first, stages=99),
        replace(first, cols=1 << 40),
    ]
    assert [x for x in others if may_run(x, spec, part, nq, nk, False)] == []


# --- what a terminal is shown -----------------------------------------------------------------------------------------


@given(st.text())
@example("\x1b]0;title\x07 \x9b31m \u202e\u2066 \ud800 \r\x00\x7f\u2028")
def test_nothing_that_a_terminal_obeys_is_shown(text: str) -> None:
    said = shown(text)
    said.encode("utf-8")
    assert all(x.isprintable() or x in "\n\t" for x in said if x not in text or not x.isspace())
    assert "\x1b" not in said
    assert shown(said) == said


HOSTILE = "\x1b]0;owned\x07\x1b[31m"


def test_cache_list_of_a_hostile_folder(
    kvt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Links to nowhere, pipes, folders, names and contents with what a terminal obeys."""
    cache = tmp_path / f"cache{HOSTILE}"
    monkeypatch.setenv("KVT_CACHE_DIR", str(cache))
    store = Store(cache / "tune")
    path = store.save(Entry(KEY, {"rows": HOSTILE}))
    path.with_name(f"evil{HOSTILE}.json").write_text(json.dumps({HOSTILE: 1}))
    path.with_name("dangling.json").symlink_to("nowhere")
    path.with_name("folder.json").mkdir()
    os.mkfifo(path.with_name("pipe.json"))
    (cache / "c").mkdir()
    (cache / "c" / "dangling.so").symlink_to("nowhere")
    (cache / "c" / "0.c").write_text(f"/* t = {HOSTILE} */")
    (cache / "c" / "0.so").write_bytes(objects.seal("0", b"no object"))
    (cache / "c" / "[red]x.c").write_text("/* */")
    os.mkfifo(cache / "c" / "pipe.so")
    (cache / "c" / "folder.so").mkdir()
    for words in (["list"], ["list", "--json"], ["show", "0"], ["show", path.stem], ["show", "nothing\x1b"]):
        result = kvt("cache", *words)
        assert result.code in (0, 2), result.err
        assert printable(result.out + result.err), words
    assert "[red]x" in kvt("cache", "list").out
    assert kvt("cache", "clear", "--yes").code == 0
    assert [x for x in cache.rglob("*") if not x.is_dir()] == []


# --- texts ------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"a": 1, "a": 2}')
@example(b"1" * 5_000)
@example(b'"\\ud800"')
@example(b"\xff")
@example(b"-Infinity")
@example(b"1e999")
def test_any_bytes_as_json(data: bytes) -> None:
    refusal = None
    try:
        json.dumps(parse_json(data), ensure_ascii=False, allow_nan=False).encode()
    except BadTextError as error:
        refusal = str(error)
    assert refusal is None or printable(refusal)


def test_json_of_the_allowed_depth() -> None:
    nest = partial(lambda n: b"[" * n + b"]" * n)
    assert parse_json(nest(DEPTH)) is not None
    with pytest.raises(BadTextError, match="nested"):
        parse_json(nest(DEPTH + 2))


GOOD_SCORES = ["0.125*s + c0[h, i, j]", "where(le(j, i), s, -oo)"]
SCORES = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="s0123456789.*+-/()[]cbhij,%<>=, whereltgeoo\\\"'#_\n{}", max_size=60),
    st.builds(
        lambda x, at, y: x[:at] + y + x[at:], st.sampled_from(GOOD_SCORES), st.integers(0, 20), st.text(max_size=6)
    ),
)


@slow
@given(SCORES)
@with_corpus("score")
def test_score_texts(text: str | bytes) -> None:
    """A text is a program, printed the same way again, or is refused."""
    text = text.decode("utf-8", errors="surrogateescape") if isinstance(text, bytes) else text
    COUNTS["score texts"] += 1
    try:
        program = parse(text)
    except ScoreSyntaxError:
        return
    canonical = to_text(program)
    assert "\n" not in canonical
    assert canonical.isascii()
    assert to_text(parse(canonical)) == canonical


@slow
@given(st.lists(st.text(max_size=12) | st.sampled_from(["*=0.5", "a=none", "=1", "1e400", "9" * 5_000]), max_size=3))
def test_topk_of_the_command_line(texts: list[str]) -> None:
    try:
        parse_topk(texts or ["0.5"])
    except UserError as error:
        shown(str(error)).encode()


@slow
@given(st.binary(max_size=400), st.binary(max_size=40))
def test_sealed_objects(body: bytes, change: bytes) -> None:
    """A seal is for a name and all bytes."""
    sealed = objects.seal("name", body)
    assert objects.unsealed("name", sealed) == body
    assert objects.unsealed("other", sealed) is None
    assert objects.unsealed("name", change) is None
    if change:
        assert objects.unsealed("name", change + sealed) is None
        assert objects.unsealed("name", sealed[: -len(change)]) is None
