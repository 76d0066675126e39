"""(module, action) -> the action runs once, right after somebody else imports the module, or now if somebody has.

What uses `torch.distributed.tensor` pays for its import; who trains on one device does not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, Callable[[], None]] = {}


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Runs `action()` after module `name` was imported.  One action a module."""
    if name in sys.modules:
        action()
        return
    _waiting[name] = action
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Finds nothing by itself: asks the other finders, and follows what they found with the action."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = _waiting.pop(name, None)  # taken first: the search below comes by here again
        if action is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            _waiting[name] = action
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                _waiting[name] = action  # the next attempt may succeed
                raise
            action()

        loader.exec_module = execute_then_act
        return spec


_FINDER = _Finder()
