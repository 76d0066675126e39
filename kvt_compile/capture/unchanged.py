"""A model that is run or traced to look at it is as it was before: buffers, attributes and random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_TRACERS = "_tensor_constant"
"""How torch.fx names what it leaves on a model that it traces."""


class Held:
    """What a model holds: its buffers, and the attributes of its modules (counters, tables, what it saw last), with
    what is in the dicts and lists among them."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # nobody puts another tensor into a ScriptModule, whose buffers are in no dict
        self._buffers = [(module, dict(module._buffers)) for module in modules if isinstance(module._buffers, dict)]
        self._unsaved = [(module, set(module._non_persistent_buffers_set)) for module, _ in self._buffers]
        self._attributes = [(module, _attributes(module)) for module in modules]
        named = [item for _, held in self._attributes for item in held.items()]
        self._contents = [(x, _content(x)) for _, held in named for x in _containers(held)]
        tensors = [(name, x) for name, held in named for x in _tensors(held)]
        buffers = list(model.buffers())
        self._numbers = [(x, x.detach().clone()) for x in (*buffers, *(x for _, x in tensors))]
        self._buffer_versions = [(x, x._version) for x in buffers if not x.is_inference()]
        self._versions = [(name, x, x._version) for name, x in tensors if not x.is_inference()]

    def new_buffers(self) -> list[str]:
        """The buffers in whose place the model has put another tensor; one that was None held nothing."""
        return [
            name
            for module, old in self._buffers
            for name, x in old.items()
            if x is not None and module._buffers.get(name) is not x
        ]

    def makes_buffers(self) -> bool:
        """Whether there are tensors now where there was no buffer."""
        return any(
            old.get(name) is None and x is not None
            for module, old in self._buffers
            for name, x in module._buffers.items()
        )

    def writes_buffers(self) -> bool:
        """Whether a buffer has other numbers by now, or may have."""
        return bool(self.new_buffers()) or any(x._version != version for x, version in self._buffer_versions)

    def replaced(self) -> list[Any]:
        """What attributes held (None where there was none) that the model has given another value."""
        return [
            old.get(name)
            for module, old in self._attributes
            for name, now in _attributes(module).items()
            if now is not old.get(name) and not name.startswith(_TRACERS)
        ]

    def has_new_content(self) -> bool:
        """Whether something else is in a dict or list."""
        return any(not _is_same(container, before) for container, before in self._contents)

    def written(self) -> list[str]:
        """The attributes, no buffers, that are tensors and were written to."""
        return [name for name, x, version in self._versions if x._version != version]

    def put_back(self) -> None:
        """What was there is again; what has come (tensors made at the first call, a tracer's constants) stays."""
        for module, old in self._buffers:
            module._buffers.update((name, x) for name, x in old.items() if x is not None)
        for module, attributes in self._attributes:
            vars(module).update(attributes)
        for container, content in self._contents:
            if not _is_same(container, content):
                _fill(container, content)

    def restore(self) -> None:
        self.put_back()
        for module, old in self._buffers:
            module._buffers.clear()
            module._buffers.update(old)
        for module, names in self._unsaved:
            module._non_persistent_buffers_set.intersection_update(names)
        for module, attributes in self._attributes:
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
        with torch.no_grad():
            for x, before in self._numbers:
                # one that did not change may be impossible to write to: an expanded table, say
                if not _equal(x, before):
                    x.copy_(before)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _containers(held: Any) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dicts and lists that an attribute is made of."""
    queue, seen = [held], set[int]()
    while queue:
        x = queue.pop()
        if not isinstance(x, dict | list | tuple) or id(x) in seen:
            continue
        seen.add(id(x))
        queue += x.values() if isinstance(x, dict) else x
        if not isinstance(x, tuple):
            yield x


def _tensors(held: Any) -> list[torch.Tensor]:
    inside = [x for container in _containers(held) for x in _content(container)]
    return [x for x in (held, *inside) if isinstance(x, torch.Tensor)]


def _content(container: dict[Any, Any] | list[Any]) -> list[Any]:
    """Keys and values of a dict, one after the other."""
    return [x for item in container.items() for x in item] if isinstance(container, dict) else list(container)


def _is_same(container: dict[Any, Any] | list[Any], before: list[Any]) -> bool:
    now = _content(container)
    return len(now) == len(before) and all(x is y for x, y in zip(now, before, strict=True))


def _fill(container: dict[Any, Any] | list[Any], content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(zip(content[::2], content[1::2], strict=True))
    else:
        container.extend(content)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Held]:
    """All that the model holds, and the random state, as before, after the model ran."""
    held = Held(model)
    with torch.random.fork_rng():
        try:
            yield held
        finally:
            held.restore()


_COLUMNS, _ROWS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COLUMNS, torch.sparse_bsr: _COLUMNS, torch.sparse_csc: _ROWS, torch.sparse_bsc: _ROWS,
}  # fmt: skip


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """torch.equal, of sparse tensors too: those are the same if their parts are."""
    if x.layout is torch.strided or x.layout is not y.layout or x.layout not in _PARTS:
        return torch.equal(x, y) if x.layout is torch.strided else False
    parts = _PARTS[x.layout]
    return x.shape == y.shape and all(torch.equal(getattr(x, part)(), getattr(y, part)()) for part in parts)
