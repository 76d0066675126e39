"""A tuning under way -> bars on stderr for a person who waits, lines in a pipe."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvt_compile.kernels.tune.key import Key
from kvt_compile.kernels.tune.progress import Step


class Shown:
    """Progress on stderr: a bar per kernel for a person who waits, a line per kernel in a pipe."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[result]}"),
            console=self._console,
        )
        self._tasks: dict[Key, TaskID] = {}

    def __enter__(self) -> Shown:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, step: Step) -> None:
        if self._console.is_terminal:
            if step.key not in self._tasks:
                self._tasks[step.key] = self._bars.add_task(f"{step.key.part}  {step.key.shape}", result="")
            result = "" if step.winner is None else f"{step.milliseconds:.3f} ms"
            self._bars.update(self._tasks[step.key], total=step.total, completed=step.done, result=result)
        elif step.winner is not None:
            typer.echo(f"kvt: tuned {step.key.part} {step.key.shape}: {step.milliseconds:.3f} ms", err=True)
