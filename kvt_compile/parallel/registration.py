"""Importing this module has the operators' rules registered as soon as somebody imports DTensor."""

from __future__ import annotations

from importlib import import_module

from kvt_compile.parallel.when_imported import when_imported


def _register() -> None:
    import_module("kvt_compile.parallel.rules").register()


when_imported("torch.distributed.tensor", _register)
