"""A Python file of the user's -> the module it makes, or a `UserError` that names the line where it failed."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from kvt_compile.cli.errors import UserError, in_one_line


def run_file(name: str, purpose: str) -> ModuleType:
    """Runs a file as a module; modules beside it can be imported from it, as if it were run by hand."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{purpose}: there is no file {name!r}")
    module_name = f"_kvt_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"{purpose}: {name!r} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look modules up by name
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{purpose}: {name} fails{where(error, path)}: {in_one_line(error)}") from error
    return module


def where(error: BaseException, path: Path) -> str:
    """` at line 12`: the last line of the user's file that an exception passed through."""
    if isinstance(error, SyntaxError):
        return f" at line {error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.resolve()
    ]
    return f" at line {lines[-1]}" if lines else ""
