"""The code -> the pages that only repeat it: docs/options.md from `Options`, docs/cli.md from the command `kvt`.

python tools/reference.py           writes them
python tools/reference.py --check   exits with 1 where one is not what it would write
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

from typer import Typer
from typer.models import ArgumentInfo

from kvt_compile import config
from kvt_compile.cli import app

ROOT = Path(__file__).parent.parent


def options_page() -> str:
    """A section for each field of `Options`: its type, its default, what its docstring says."""
    (cls,) = (node for node in ast.parse(inspect.getsource(config.Options)).body if isinstance(node, ast.ClassDef))
    says: dict[str, str] = {}
    for field, text in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            says[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    sections = [
        f"## `{field.name}`\n\n{says[field.name]}\n\nDefault: `{field.default!r}`. Type: `{field.type}`."
        for field in fields(config.Options)
    ]
    head = (
        "# Options\n\n"
        "<!-- Written by tools/reference.py from kvt_compile/config.py: change the docstrings there. -->\n\n"
        'The same for `torch.compile(model, backend="kvt", options={...})`, `kvt_compile.rewrite(model, ...)` and '
        "`kvt_compile.explain(model, ...)`, but for `then`, which is for the first "
        "alone. Options of Inductor may stand among those of `torch.compile` and are "
        "passed on to it. An unknown name is an error that suggests the nearest."
    )
    return "\n\n".join([head, *sections]) + "\n"


def cli_page() -> str:
    """A section for each verb: usage, what it does, its options."""
    head = (
        "# The command `kvt`\n\n"
        "<!-- Written by tools/reference.py from kvt_compile/cli: change the help texts there. -->\n\n"
        "A mistake ends in one sentence on stderr and exit code 2. `python -m kvt_compile.cli` is the same command."
    )
    return "\n\n".join([head, *sorted(_verbs(app, "kvt"))]) + "\n"


def _verbs(group: Typer, prefix: str) -> Iterator[str]:
    for command in group.registered_commands:
        if command.callback is not None:
            yield _verb(f"{prefix} {command.name or command.callback.__name__}", command.callback)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from _verbs(inner.typer_instance, f"{prefix} {inner.name}")


def _verb(verb: str, function: Callable[..., object]) -> str:
    """From the annotations, not from the parser typer makes of them: that one changes with its version."""
    usage, takes, rows = [verb], [], []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        type_, info = get_args(parameter.annotation)
        if isinstance(info, ArgumentInfo):
            usage.append(info.metavar or name.upper())
            takes.append(f"- `{usage[-1]}`: {_cell(info.help)}")
            continue
        kinds = [kind for kind in (get_args(type_) or (type_,)) if kind is not type(None)]
        flag = kinds == [bool]
        # in an annotation, typer's first positional argument is the first name
        declared = [x for x in (info.default, *(info.param_decls or ())) if isinstance(x, str) and x.startswith("-")]
        names = ", ".join(f"`{option}`" for option in declared or [f"--{name.replace('_', '-')}"])
        value = "" if flag else f"`{(info.metavar or kinds[0].__name__.upper()).replace('|', ' or ')}`"
        default = parameter.default if isinstance(info.show_default, bool) else info.show_default
        if default is inspect.Parameter.empty:
            default = "(required)"
        rows.append(f"| {names} {value} | {'' if default in (None, False) else default} | {_cell(info.help)} |")
    table = "\n".join(["| option | default | |", "|---|---|---|", *rows])
    text = inspect.getdoc(function) or ""
    parts = [f"## `{verb}`", f"    {' '.join([*usage, '[OPTIONS]'])}", text, "\n".join(takes), table]
    return "\n\n".join(part for part in parts if part)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").strip()


PAGES = {"options.md": options_page, "cli.md": cli_page}


def main(check: bool) -> int:
    stale = []
    for name, write in PAGES.items():
        file, text = ROOT / "docs" / name, write()
        if not file.exists() or file.read_text() != text:
            stale.append(f"docs/{name}")
            if not check:
                file.write_text(text)
    if check and stale:
        print(f"{', '.join(stale)}: not what the code says; run python tools/reference.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
