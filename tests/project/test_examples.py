"""Every example runs, in its small form; the notebook runs top to bottom."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

EXAMPLES = ROOT / "examples"
HELPERS = {"torchvision_cpu", "eager_kvt", "digits"}
"""Imported by examples; no examples themselves."""

CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "quickstart": lambda example, folder: example.main(["--small"]),
    "any_timm_model": lambda example, folder: example.main("vit_tiny_patch16_224", small=True),
    "train_digits": lambda example, folder: example.main(small=True, out=folder / "curves.png"),
    "rewrite_and_export": lambda example, folder: example.main(small=True),
    "faster_vit": lambda example, folder: example.main(small=True),
    "calibrate_digits": lambda example, folder: example.main(small=True, folder=folder),
    "inspect_model": lambda example, folder: example.main(small=True, page=folder / "page.html"),
    "hugging_face": lambda example, folder: example.main(),
    "learned_selector": lambda example, folder: example.main(small=True),
    "own_policy": lambda example, folder: example.main(),
    "official_kvt": lambda example, folder: example.main(depth=1),
    "op_in_a_model": lambda example, folder: example.main(),
    "many_ranks": lambda example, folder: example.main([]),
}
WRITES = {
    "train_digits": {"curves.png"},
    "calibrate_digits": {"digits_policy.json", "digits_policy.png"},
    "inspect_model": {"page.html"},
}


def test_every_example_is_run_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(CALLS) | HELPERS


@pytest.mark.parametrize("name", CALLS)
def test_example(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module(name)
    CALLS[name](example, tmp_path)
    assert capsys.readouterr().out.strip()
    assert {file.name for file in tmp_path.iterdir()} == WRITES.get(name, set())


@pytest.mark.parametrize("name", CALLS)
def test_example_says_what_it_is_and_has_a_main(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    says = ast.get_docstring(tree)
    assert says is not None
    assert f"python examples/{name}.py" in says
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_notebook_runs_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, in one namespace, with a smaller model."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    sizes = "DEPTH, SIZE = 12, 224"
    assert sum(sizes in cell for cell in cells) == 1
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell.replace(sizes, "DEPTH, SIZE = 2, 64"), f"cell {number}", "exec"), namespace)
    assert "2 sites: 2 fused" in capsys.readouterr().out
    assert torch.is_tensor(namespace["out"])
