"""A text from a saved program that anybody may have edited: what is refused, and what of it reaches generated code."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvt_compile.kernels.c.generate import source
from kvt_compile.kernels.language import limits
from kvt_compile.kernels.language import score as language
from kvt_compile.kernels.language.expressions import NotGenerated
from kvt_compile.kernels.op.spec import CapturedSpec, KernelSpec, SoftmaxSpec, SpecError
from kvt_compile.kernels.source import Source
from kvt_compile.kernels.triton.generate import module_source

PRINTED = re.compile(r"[a-z0-9_ .,+\-*/%()\[\]]+")
"""Every character the printer emits."""

ATTACKS = {
    "comment ends a C comment": "0.5*s # */ __attribute__((constructor)) static void f(void) { abort(); } /*",
    "comment ends a docstring": '0.5*s # """\nimport os\nos.abort()\n"""',
    "comment alone": "0.5*s # harmless",
    "line break": "0.5*s\n",
    "line break in brackets": "(0.5*\ns)",
    "carriage return": "0.5*s\r",
    "form feed": "\f0.5*s",
    "tab": "0.5*\ts",
    "backslash": "0.5*s\\\n",
    "trigraph": "0.5*s #??/",
    "string": "0.5*s + 'x'",
    "letter that Python normalises": "0.5*\N{MATHEMATICAL ITALIC SMALL S}",
    "digit that is not ASCII": "s*\N{ARABIC-INDIC DIGIT TWO}",
    "line separator": "s\N{LINE SEPARATOR}",
    "escape": "s\N{ESCAPE}[2J",
    "lone surrogate": "s\ud800",
    "null": "s\0",
    "underscores": "1_000*s",
    "hexadecimal": "0x10*s",
    "complex": "1j*s",
    "keyword": "s if s else s",
    "walrus": "(x := s)",
    "starred": "where(*s)",
    "named argument": "exp(x=s)",
    "leading zero": "c00[j]",
    "truth": "True*s",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_printer_never_writes_is_refused(attack: str) -> None:
    for text in (ATTACKS[attack], ATTACKS[attack].replace("s", "p", 1)):
        with pytest.raises(language.ScoreSyntaxError) as error:
            language.parse(text)
        assert str(error.value).isprintable()
        with pytest.raises(language.ScoreSyntaxError):
            KernelSpec("float32", "float32", 8, 8, score=text)
        with pytest.raises(language.ScoreSyntaxError):
            KernelSpec("float32", "float32", 8, 8, weight=text)


@pytest.mark.parametrize("attack", ["comment ends a C comment", "comment ends a docstring", "line break"])
@pytest.mark.parametrize("lowering", ["c", "aten", "reference", "auto"])
def test_the_operator_refuses_it(attack: str, lowering: str) -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="not part of the score language"):
        torch.ops.kvt.attention(q, q, q, [], ATTACKS[attack], "p", 2, [], 0.0, None, lowering)
    with pytest.raises(ValueError, match="not part of the score language"):
        torch.ops.kvt.attention(q, q, q, [], "s", ATTACKS[attack].replace("s", "p"), 2, [], 0.0, None, lowering)


@pytest.mark.parametrize("text", ["9**9**9*s", "s*9**9**9**9", "abs(9)**abs(9)**abs(9)*s", "s + 10**400"])
def test_powers_of_numbers_end(text: str) -> None:
    """Whole numbers wrap around as torch's do: Python's would grow until memory ends."""
    q = torch.randn(1, 1, 3, 4)
    found = {
        lowering: torch.ops.kvt.attention(q, q, q, [], text, "p", 2, [], 0.0, None, lowering)[0]
        for lowering in ("reference", "aten", "auto")
    }
    for lowering in ("aten", "auto"):
        torch.testing.assert_close(found[lowering], found["reference"], rtol=1e-5, atol=1e-6, equal_nan=True)


HUGE = {
    "tower of powers": "c0[9**9**9]",
    "tower of float powers": "c0[9.0**9.0**9.0**9.0]",
    "powers of powers": "c0[((2*i)**64)**64]",
    "exponent": "s**100000",
    "exponent of a symbol": "c0[((i**1000)**1000)**1000]",
    "product of powers": f"c0[{'*'.join(['9**64'] * 90)}]",
    "integer": "9" * 300 + "*s",
    "more digits than Python reads": "9" * 5000 + "*s",
    "float": "1e999*s",
    "float by a product": "c0[1e300*i*1e300]",
    "ratio": f"c0[{'+'.join(f'1/{n}' for n in range(1000, 1060))}]",
    "no number": "c0[oo - oo]",
    "division by zero": "c0[i/0]",
    "root of a negative number": "c0[(-8)**0.5*i]",
    "length": "s + " * 10_000 + "s",
    "chain": "s+" * 200 + "s",
    "tokens": "s+" * 3_000 + "s",
    "brackets": "(" * 100 + "s" + ")" * 100,
    "calls": "abs(" * 100 + "s" + ")" * 100,
    "signs": "-" * 1_500 + "s",
    "powers": "s**" * 900 + "s",
    "remainders": "i%" * 900 + "2",
    "indices": "c0[" * 100 + "i" + "]" * 100,
    "name": "n" * 10_000,
    "number of a tensor": "c123456789[j]",
    "number of a size": "n123456789*s",
}


@pytest.mark.parametrize("kind", HUGE)
def test_what_is_too_large_is_refused_before_it_is_evaluated(kind: str) -> None:
    with pytest.raises(language.ScoreSyntaxError) as error:
        language.parse(HUGE[kind])
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(
    "text",
    [
        # as `to_text` printed them in programs that were saved
        "s", "0.125*s", "s/3", "0.125*s + c0[h, i, j]", "where(c0[b % 4, i, j], 0.125*s, -oo)", "sqrt(s)",
        "c0 + 3.0*tanh(0.3333333333333333*s)",
        "s - 3.4028234663852886e+38*c0[0, i, j]", "1e-05*s", "s*c0[-j + n0 - 1]", "s/(c0[i] + 1.0)**0.5",
        "s*exp(minimum(c2[h], 4.605170185988092)) + c0[c1[8*(i // 7) + j // 7, i % 7], h]",
        "where(logical_and(le(j, i), lt(i - j, 5)), s, -oo)", "0.5*s - (i - j)*c0[h]", "s + 10000.0*c0[b, j] - 10000.0",
    ],
)  # fmt: skip
def test_texts_of_saved_programs_are_canonical_and_still_read(text: str) -> None:
    assert language.canonical(text) == text


def test_a_generator_sees_the_printed_text_only() -> None:
    captured = (CapturedSpec("float32", 1),)
    spec = KernelSpec("float32", "float32", 8, 8, score="c0[j]+s*+0.5", weight="( p )", captured=captured)
    assert (spec.score, spec.weight) == ("c0[j] + 0.5*s", "p")
    assert spec == KernelSpec("float32", "float32", 8, 8, score="c0[j] + 0.5*s", captured=captured)


@pytest.mark.parametrize("name", ["float32 */", 'float32"""', "linalg", "float31", "nn", "", "FLOAT32"])
def test_dtypes_are_those_of_torch(name: str) -> None:
    with pytest.raises(SpecError, match="dtype"):
        CapturedSpec(name, 1)
    with pytest.raises(SpecError, match="dtype"):
        KernelSpec("float32", name, 8, 8)
    with pytest.raises(SpecError, match="dtype"):
        SoftmaxSpec("float32", name)
    with pytest.raises(SpecError, match="dtype"):
        SoftmaxSpec(name, "float32")


LINES = ["a\nint x;", "a\\", "a\r#", "a??/", "a\N{LINE SEPARATOR}b", "a*/b", 'a"""b', "a\x1b[2J", "a\ud800"]


@pytest.mark.parametrize("line", LINES)
def test_a_heading_is_one_comment_line(line: str) -> None:
    for language_name in ("c", "python"):
        head, second, rest = Source(language_name, "text\n").headed(line, "second").split("\n", 2)  # type: ignore[arg-type]
        assert (head.isprintable(), head.isascii(), head.endswith(("\\", "??/"))) == (True, True, False)
        assert second in ("// second", "# second")
        assert rest == "\ntext\n"


# --- any text at all --------------------------------------------------------------------------------------------------

_LEAVES = st.sampled_from(
    ["s", "s", "b", "h", "i", "j", "n0", "c0[j]", "c1[h,i]", "c2", "oo", "0", "1", "2", "3", "0.125", "1e-05", "2e+20"]
)
_UNARY = ("exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf", "abs", "relu", "logical_not")
_BINARY = ("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "maximum", "minimum")


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    sign = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", " + ", " - ", " // "])
    infix = st.tuples(inner, sign, inner).map("".join)
    return st.one_of(
        infix,
        infix.map("({})".format),
        inner.map("-{}".format),
        st.tuples(st.sampled_from(_UNARY), inner).map(lambda x: f"{x[0]}({x[1]})"),
        st.tuples(st.sampled_from(_BINARY), pair).map(lambda x: f"{x[0]}({x[1][0]}, {x[1][1]})"),
        st.tuples(inner, inner, inner).map(lambda x: f"where({x[0]}, {x[1]}, {x[2]})"),
    )


PROGRAMS = st.recursive(_LEAVES, _larger, max_leaves=8)
_MARKS = ["*/", "/*", "#", "//", "??/", "\\u002a", "{{", "%}", ";", "s", "(", ")"]
FRAGMENTS = st.sampled_from([*_MARKS, '"""', "'''", "\n", "\r", "\\\n", "\0", "\N{FULLWIDTH ASTERISK}"])


@st.composite
def hostile(draw: st.DrawFn) -> str:
    """A program with something put in somewhere."""
    text, put = draw(PROGRAMS), draw(st.one_of(FRAGMENTS, st.text(max_size=4)))
    place = draw(st.integers(0, len(text)))
    return text[:place] + put + text[place:]


CAPTURED = (CapturedSpec("float32", 1), CapturedSpec("float32", 2), CapturedSpec("float32", 0))


@settings(max_examples=300, deadline=None)
@given(st.one_of(PROGRAMS, hostile(), st.text(max_size=40)))
@example("0.5*s # */ int x;")
def test_any_text_is_refused_or_has_a_canonical_form(text: str) -> None:
    try:
        printed = language.canonical(text)
    except language.ScoreSyntaxError:
        return
    assert PRINTED.fullmatch(printed)
    assert not any(mark in printed for mark in ("*/", "/*"))
    assert language.canonical(printed) == printed


@settings(max_examples=60, deadline=None)
@given(st.one_of(PROGRAMS, hostile()))
def test_generated_code_holds_printed_characters_only(text: str) -> None:
    try:
        spec = KernelSpec("float32", "float32", 8, 8, score=text, captured=CAPTURED, sizes=1)
    except (language.ScoreSyntaxError, SpecError):
        return
    plain = KernelSpec("float32", "float32", 8, 8, captured=CAPTURED, sizes=1)
    for generate, comment in ((source, "*/"), (module_source, '"""')):
        try:
            code, without = generate(spec), generate(plain)
        except NotGenerated:
            continue
        assert all(x.isascii() and (x.isprintable() or x == "\n") for x in code)
        assert set(code) <= set(without) | set("abcdefghijklmnopqrstuvwxyz0123456789_ .,+-*/%()[]INFAR?:<>=!&|~")
        # wherever the text stands, it stands whole, in printed form
        assert spec.score in code
        assert text == spec.score or len(text) < 4 or f"t = {text}\n" not in code
        assert code.count(comment) >= without.count(comment)


def test_the_limits_leave_room_for_what_models_do() -> None:
    text = " + ".join(f"c{n}[b % 64, h, i // 7, j % 49]*s" for n in range(60))
    assert language.canonical(text).count("c59[") == 1
    assert limits.TOKENS >= 2_000
