"""`kvt cache list | show | clear | export | import`: what the library keeps on this machine.

Two kinds: tuning results (measured block sizes, one JSON file each) and C kernels (compiled code with its source).
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
from kvt_compile.kernels.c.cache import Built, built, is_whole
from kvt_compile.kernels.cache_folder import cache_folder
from kvt_compile.kernels.tune import transfer
from kvt_compile.kernels.tune.entry import Entry
from kvt_compile.kernels.tune.store import Store, parse_entry, read_into

app = typer.Typer(help="What is kept on this machine: tuning results and compiled C kernels.", no_args_is_help=True)


@dataclass(frozen=True)
class Item:
    """One thing in the cache."""

    kind: str
    """"tuning" or "c"."""
    name: str
    what: str
    """For a person: what it is for, or what is wrong with it."""
    size: int
    """Bytes."""
    files: tuple[Path, ...]
    text: Path
    """The file that `show` prints."""
    entry: Entry | None = None


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
            table.add_row(x.kind, x.name, Text(x.what), _bytes(x.size))  # not markup: c0[h, i, j]
        Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    typer.echo(f"{_count(items)} in {cache_folder()}")


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A name of the list, or how it begins.")]) -> None:
    """Print one thing: a tuning result with all measured times, or the source of a C kernel."""
    items = _items()
    found = [x for x in items if x.name == name] or [x for x in items if x.name.startswith(name)]
    if len(found) > 1:
        raise UserError(f"{len(found)} names begin with {name!r}: {', '.join(x.name for x in found[:5])}")
    if not found:
        raise UserError(f"nothing named {name!r} in {cache_folder()}{did_you_mean(name, [x.name for x in items])}")
    try:
        typer.echo(found[0].text.read_text(encoding="utf-8", errors="replace"), nl=False)
    except OSError as error:
        raise UserError(f"{found[0].text} cannot be read: {error.strerror}") from None


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
        typer.echo(f"nothing to remove in {cache_folder()}")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this would remove {_count(items)}; add --yes where nobody can be asked")
        if not typer.confirm(f"Remove {_count(items)} from {cache_folder()}?"):
            typer.echo("nothing removed")
            return
    try:
        for item in items:
            for file in item.files:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be removed: {error.strerror}") from None
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
    """Tuning results, then C kernels; damaged ones too."""
    return [*map(_result, _store().files()), *map(_kernel, built(cache_folder()))]


def _result(path: Path) -> Item:
    entry: Entry | None = None
    try:
        entry = parse_entry(path)
        blocks = " ".join(f"{name}={value}" for name, value in entry.winner.items())
        times = f" {entry.measured[0].milliseconds:.3f} ms" if entry.measured else ""
        what = f"{entry.key.device}  {entry.key.shape}\n{blocks}{times}"
    except (OSError, ValueError) as error:
        what = f"damaged: {error}"
    return Item("tuning", path.stem, what, path.stat().st_size, (path,), path, entry)


def _kernel(kernel: Built) -> Item:
    what = _title(kernel.source) if is_whole(kernel.path) else "damaged: will be built again"
    return Item("c", kernel.path.stem, what, kernel.size, (kernel.path, kernel.source), kernel.source)


def _title(source: Path) -> str:
    """What a generated source says of itself: its score expression, or its first line."""
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()[:8]
    except OSError:
        return "(its source is missing)"
    about = [line.strip(" */") for line in lines if line.strip(" */")]
    scores = [line for line in about if " t = " in line]
    return (scores or about or ["(its source is empty)"])[0]


def _count(items: Sequence[Item]) -> str:
    parts = [
        f"{len(some)} {name}{'' if len(some) == 1 else 's'} ({_bytes(sum(x.size for x in some))})"
        for name, kind in (("tuning result", "tuning"), ("C kernel", "c"))
        if (some := [x for x in items if x.kind == kind])
    ]
    return " and ".join(parts) or "nothing"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
