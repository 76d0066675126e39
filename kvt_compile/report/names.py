"""A graph's names for captured tensors -> names for people.

    l_self_modules_blocks_modules_1_buffers_attn_mask_  ->  attn_mask
    l_kwargs_bias_                                      ->  bias
    relative_position_bias_19                           ->  relative_position_bias

A site keeps its graph's names where two of its tensors would come to share one, or one would read as part of the
score language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvt_compile.kernels.language.score import FUNCTIONS
from kvt_compile.passes.site import Captured

RESERVED = {"s", "p", "b", "h", "i", "j", "oo", "dropout", *FUNCTIONS}


def short_names(captured: Sequence[Captured]) -> dict[str, str]:
    """The graph's name -> the short one, different for each."""
    names = [tensor.name for tensor in captured]
    steps: tuple[Callable[[str], str], ...] = (lambda name: _unnumbered(_owned(name)), _owned)
    for shorten in steps:
        short = {name: shorten(name) for name in names}
        if len(set(short.values())) == len(short) and all(
            x.isidentifier() and x not in RESERVED for x in short.values()
        ):
            return short
    return {name: name for name in names}


def _owned(name: str) -> str:
    """Without what Dynamo writes around the attribute or input a placeholder stands for."""
    return re.sub(r"^l_(.*_(parameters|buffers)_(?=[a-z])|(kwargs|self)_(?=[a-z]))?", "", name).strip("_")


def _unnumbered(name: str) -> str:
    """Without the number that makes it different from the same value of another layer."""
    return re.sub(r"_\d+$", "", name)


def renamed(text: str, names: dict[str, str]) -> str:
    """An expression with every captured tensor under its short name."""
    return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), text)


def renamed_sources(text: str) -> str:
    """The text of canonical values with short names of inputs, parameters and buffers."""
    return re.sub(r"(?m)(?<= = )(input|parameter|buffer) (\w+)$", lambda line: f"{line[1]} {_owned(line[2])}", text)


def folded(label: str, width: int) -> str:
    """Module paths that are longer than `width` columns go on in the next line after a dot: `encoder.layer.11.` and
    `attention.self`.  Ranges of numbers (`{0..11}`) stay whole."""
    return " ".join(_at_dots(word, width) if len(word) > width else word for word in label.split(" "))


def _at_dots(path: str, width: int) -> str:
    lines = [""]
    for part in re.findall(r"(?:\{[^}]*\}|[^.{])*\.|(?:\{[^}]*\}|[^.{])+", path):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def with_name(tensor: Captured, names: dict[str, str]) -> Captured:
    return replace(tensor, name=names[tensor.name], index=renamed(tensor.index, names))
