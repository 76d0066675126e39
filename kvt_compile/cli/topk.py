"""The texts of --topk, --select, --grid and --batch-dim -> the values the library takes.

"100" -> 100      "0.5" -> 0.5      "none" -> None      "blocks.0.*=64" and "0.5" -> {"blocks.0.*": 64, "*": 0.5}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvt_compile.cli.errors import UserError
from kvt_compile.passes.decide import Rest
from kvt_compile.topk import validate

Topk = int | float | None


def keeping(topk: Sequence[str] | None, select: str | None) -> dict[str, Any]:
    """The option `select`, or `topk` where there is none.  Raises UserError where both were given."""
    if select is None:
        return {"topk": parse_topk(topk or ["0.5"])}
    if topk:
        raise UserError("--topk and --select were both given; write --select '... & topk(64)'")
    return {"select": select}


def parse_grid(text: str | None) -> tuple[int, ...] | None:
    """ "64x-1" -> (64, -1).  Raises UserError."""
    if text is None:
        return None
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise UserError(f"--grid {text!r} is no grid; write the size of each axis, such as 64x64 or 64x-1") from None


def parse_batch_dim(texts: Sequence[str] | None) -> int | dict[str, int] | None:
    """["0"] -> 0, ["x=0", "y=1"] -> {"x": 0, "y": 1}.  Raises UserError."""
    if not texts:
        return None
    axes = [(name.strip(), _axis(axis, text)) for text in texts for name, _, axis in (text.rpartition("="),)]
    if len(axes) == 1 and not axes[0][0]:
        return axes[0][1]
    if any(not name for name, _ in axes):
        raise UserError("--batch-dim: give one axis for all inputs, or NAME=AXIS for each that has a batch")
    return dict(axes)


def _axis(text: str, whole: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"--batch-dim {whole!r} is no axis counted from 0, such as 0, or x=0 for one input")
    return int(text)


def parse_topk(texts: Sequence[str]) -> Topk | dict[str, Topk]:
    """One plain value, or a value per pattern with at most one plain value for the rest.  Raises UserError."""
    rules = {pattern: _value(value) for pattern, equals, value in (t.rpartition("=") for t in texts) if equals}
    plain = [text for text in texts if "=" not in text]
    if len(plain) > 1:
        raise UserError(f"--topk has {len(plain)} plain values ({', '.join(plain)}); give one, others as PATTERN=K")
    if not rules:
        return _value(plain[0])
    return rules | ({Rest("*"): _value(plain[0])} if plain else {})


def _value(text: str) -> Topk:
    if text.strip().lower() == "none":
        return None
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        try:
            return validate(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"--topk {text}: {error}") from None
    raise UserError(f"--topk {text!r} is not a count such as 100, a ratio in (0, 1] such as 0.5, or none")
