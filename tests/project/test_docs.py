"""The site: pages written from the code say what the code says, and nothing that is named is missing.  (`make docs`,
which CI runs, builds it strictly.)"""

from __future__ import annotations

import re
import runpy

import pytest
from places import ROOT
from selector_drawings import DRAWINGS, IMAGES, path_of, svg

from kvt_compile.select.values import KINDS, Given

CONFIG = (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", ["options.md", "cli.md"])
def test_reference_page_is_what_the_code_says(page: str) -> None:
    write = runpy.run_path(str(ROOT / "tools" / "reference.py"))["PAGES"][page]
    assert (ROOT / "docs" / page).read_text() == write(), "run python tools/reference.py (make docs does)"


def test_code_on_the_first_page_fits_its_width() -> None:
    """80 columns: what the theme shows of a code block without scrolling, between its two side bars."""
    page = (ROOT / "docs/index.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", page, re.S) + re.findall(r"^(?: {4}.*\n)+", page, re.M)
    assert len(blocks) >= 4
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_of_what_the_reference_keeps(name: str) -> None:
    assert path_of(name).read_text(encoding="utf-8") == svg(DRAWINGS[name]), "make drawings"


def test_every_selector_is_defined_and_drawn() -> None:
    page = (ROOT / "docs/selection.md").read_text()
    shown = set(re.findall(r"\((images/select_\w+\.svg)\)", page))
    assert shown == {f"images/{path_of(name).name}" for name in DRAWINGS}
    assert set(IMAGES.glob("select_*.svg")) == {path_of(name) for name in DRAWINGS}
    definitions = page.split("## The selectors")[1]
    sections = re.findall(r"^### ([^\n]+)$(.*?)(?=^### |\Z)", definitions, re.M | re.S)
    defined = {name for head, _ in sections for name in re.findall(r"`(\w+)\(", head)}
    kinds = (*KINDS.values(), Given)
    assert defined == {kind.__name__.lower() for kind in kinds}
    assert all("images/select_" in text for _, text in sections)


def test_every_page_is_in_the_navigation() -> None:
    assert set(re.findall(r": ([\w/]+\.md)$", CONFIG, re.M)) == {
        str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")
    }


def test_included_code_exists_and_every_example_is_listed() -> None:
    pages = {file.name: file.read_text() for file in (ROOT / "docs").rglob("*.md")}
    included = {name for text in pages.values() for name in re.findall(r'^--8<-- "(.+)"$', text, re.M)}
    assert included
    assert all((ROOT / name).is_file() for name in included)
    listed = set(re.findall(r"`examples/([\w.]+)`", pages["examples.md"]))
    helpers = {"torchvision_cpu.py", "eager_kvt.py", "digits.py"}
    assert {file.name for file in (ROOT / "examples").iterdir() if file.is_file()} == listed | helpers
