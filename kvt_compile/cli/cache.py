"""`kvt cache list | show | clear | export | import`: what the library keeps on this machine.

Tuning results (measured block sizes, one JSON file each), C kernels (compiled code with its source), and what processes
left behind that were killed while they made one of these.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvt_compile.cli.errors import UserError, did_you_mean, in_one_line
from kvt_compile.kernels.c.objects import Built, kept, remove, unfinished, what_is_wrong
from kvt_compile.kernels.cache_folder import cache_folder
from kvt_compile.kernels.disk.text import shown
from kvt_compile.kernels.disk.trust import read_own
from kvt_compile.kernels.disk.write import size_of
from kvt_compile.kernels.tune import transfer
from kvt_compile.kernels.tune.entry import Entry
from kvt_compile.kernels.tune.store import Store, read_into

app = typer.Typer(help="What is kept on this machine: tuning results and compiled C kernels.", no_args_is_help=True)


@dataclass(frozen=True)
class Item:
    """One thing in the cache."""

    kind: str
    """"tuning" or "c", also of what was to become one."""
    name: str
    what: str
    """For a person: what it is for, or what is wrong with it."""
    size: int
    """Bytes."""
    files: tuple[Path, ...]
    text: Path
    """The file that `show` prints."""
    entry: Entry | None = None
    leftover: bool = False
    """Not finished, and nobody works on it."""


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List everything with its size."""
    items = _items()
    if as_json:
        rows = [{"kind": x.kind, "name": x.name, "what": x.what, "bytes": x.size, "file": str(x.text)} for x in items]
        typer.echo(json.dumps({"folder": str(cache_folder()), "items": rows}, indent=2))
        return
    if items:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("kind", "name", "what", "size"):
            table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
        for x in items:
            # not markup: c0[h, i, j]
            table.add_row(x.kind, Text(shown(x.name, keep="")), Text(shown(x.what)), _bytes(x.size))
        Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    typer.echo(f"{_count(items)} in {_folder()}")


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A name of the list, or how it begins.")]) -> None:
    """Print one thing: a tuning result with all measured times, or the source of a C kernel."""
    items = _items()
    found = [x for x in items if x.name == name] or [x for x in items if x.name.startswith(name)]
    if len(found) > 1:
        raise UserError(f"{len(found)} names begin with {name!r}: {', '.join(x.name for x in found[:5])}")
    if not found:
        raise UserError(f"nothing named {name!r} in {_folder()}{did_you_mean(name, [x.name for x in items])}")
    try:
        text = read_own(found[0].text).decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{found[0].text} cannot be read: {error.strerror or error}") from None
    typer.echo(shown(text), nl=False)


@app.command()
def clear(
    tuning: Annotated[bool, typer.Option("--tuning", help="Only tuning results.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Only C kernels.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove everything, or one kind; what is needed is measured and built again."""
    kinds = [kind for kind, asked in (("tuning", tuning), ("c", kernels)) if asked or not (tuning or kernels)]
    items = [x for x in _items() if x.kind in kinds]
    if not items:
        typer.echo(f"nothing to remove in {_folder()}")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {_count(items)}; add --yes where nobody can be asked")
        if not typer.confirm(f"Remove {_count(items)} from {_folder()}?"):
            typer.echo("nothing removed")
            return
    try:
        for item in items:
            for file in item.files:
                remove(file)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed: {error.strerror or error}") from None
    typer.echo(f"removed {_count(items)}")


@app.command("export")
def export(file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON file to write.")]) -> None:
    """Write every tuning result to one file, for other machines with the same GPU.

    C kernels are not exported: compiled code fits one compiler and one CPU, and takes a second to build.
    """
    entries = [x.entry for x in _items() if x.entry is not None]
    if not entries:
        raise UserError(f"there is no tuning result to export in {_store().folder}")
    try:
        written = transfer.write(file, entries)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {in_one_line(error)}") from None
    typer.echo(f"{written} tuning results written to {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `kvt cache export` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Also where a result is there already.")] = False,
) -> None:
    """Add the tuning results of a file; all of it is checked before anything is written."""
    try:
        added, left = read_into(file, _store(), replace)
    except transfer.BadFile as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{_store().folder} cannot be written: {in_one_line(error)}") from None
    kept = f", {left} were there already (--replace takes the file's)" if left else ""
    typer.echo(f"{added} tuning results added{kept}")


def _store() -> Store:
    return Store(cache_folder() / "tune")


def _items() -> list[Item]:
    """Tuning results, then C kernels; damaged ones too; then what was left behind."""
    return [
        *map(_result, _store().files()),
        *map(_kernel, kept(cache_folder())),
        *(_leftover("tuning", path) for path in _store().unfinished()),
        *(_leftover("c", path) for path in unfinished(cache_folder())),
    ]


def _leftover(kind: str, path: Path) -> Item:
    return Item(kind, path.name, "left by a process that was killed", size_of(path), (path,), path, leftover=True)


def _folder() -> str:
    return shown(str(cache_folder()), keep="")


def _result(path: Path) -> Item:
    entry: Entry | None = None
    try:
        entry = _store().parse(path)
        blocks = " ".join(f"{name}={value}" for name, value in entry.winner.items())
        times = f" {entry.measured[0].milliseconds:.3f} ms" if entry.measured else ""
        what = f"{entry.key.device}  {entry.key.shape}\n{blocks}{times}"
    except (OSError, ValueError) as error:
        what = f"damaged: {error.strerror or error}" if isinstance(error, OSError) else f"damaged: {error}"
    return Item("tuning", path.stem, what, size_of(path), (path,), path, entry)


def _kernel(kernel: Built) -> Item:
    reason = what_is_wrong(kernel.path)
    what = f"damaged: {reason}; it will be built again" if reason else _title(kernel.source)
    return Item("c", kernel.path.stem, what, kernel.size, (kernel.path, kernel.source), kernel.source)


def _title(source: Path) -> str:
    """What a generated source says of itself: its score expression, or its first line."""
    try:
        lines = read_own(source).decode("utf-8", errors="replace").splitlines()[:8]
    except OSError:
        return "(its source is missing)"
    about = [line.strip(" */") for line in lines if line.strip(" */")]
    scores = [line for line in about if " t = " in line]
    return (scores or about or ["(its source is empty)"])[0]


def _count(items: Sequence[Item]) -> str:
    parts = [
        f"{len(some)} {name}{'' if len(some) == 1 else 's'} ({_bytes(sum(x.size for x in some))})"
        for name, kind in (("tuning result", "tuning"), ("C kernel", "c"), ("leftover", ""))
        if (some := [x for x in items if (x.leftover if not kind else x.kind == kind and not x.leftover)])
    ]
    return " and ".join(parts) or "nothing"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
