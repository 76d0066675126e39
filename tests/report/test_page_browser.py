"""The page in headless Chromium: what opens when, by mouse and by keyboard, in light and in dark, and how fast.

Skipped, with the reason, where playwright (`pip install playwright`) or a Chromium on the PATH is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_report import REFUSAL, SITE

import kvt_compile
from kvt_compile.report.facts import GraphReport, NodeReport, SiteNodes
from kvt_compile.report.report import Report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")
SCHEMES = ("light", "dark")
PARTS = ("attn", "mlp")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, of which one is left dense."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    report = kvt_compile.explain(model, torch.randn(1, 3, 224, 224), topk={"blocks.11.*": None, "*": 0.5}, lowering="c")
    return report.to_html(tmp_path_factory.mktemp("page") / "vit.html", title="vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of 1,000 nodes in 50 blocks, each reading its neighbour and one far above; and a refusal."""
    nodes = [
        NodeReport(
            f"n{i}", "operation", "softmax" if i % 20 == 9 else "add", f"blocks.{i // 20}.{PARTS[i % 20 > 11]}",
            "net.py:1", tuple(f"n{j}" for j in (i - 1, i - 13) if j >= 0), (8, 8), "float32", "add()",
        )
        for i in range(1000)
    ]  # fmt: skip
    sites = tuple(SiteNodes(b, f"n{b * 20 + 9}", (f"n{b * 20 + 9}",), ()) for b in range(49))
    graph = GraphReport(0, "", tuple(nodes), (), sites, {0: "n989"})
    report = Report((SITE,) * 49, (REFUSAL,), (graph,))
    return report.to_html(tmp_path_factory.mktemp("page") / "large.html")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page; afterwards, nothing may have gone wrong in it and nothing may have been fetched."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, scheme: str = "light", fragment: str = "", width: int = 1400, blank: bool = False) -> Any:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.set_default_timeout(120_000)  # other tests may keep the machine busy
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith("file://") else None)
        page.goto("about:blank" if blank else f"file://{path}{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def ratio(page: Any, selector: str) -> float:
    """Contrast of an element's text against what is behind it (WCAG 2)."""
    return float(
        page.evaluate(
            """(selector) => {
                const rgb = (text) => {
                    const n = text.match(/[\\d.]+/g).map(Number);
                    return text.startsWith("color(srgb") ? [...n.slice(0, 3).map((x) => x * 255), n[3] ?? 1] : n;
                };
                const light = (c) => {
                    const linear = (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
                    const [r, g, b] = c.slice(0, 3).map((x) => linear(x / 255));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const element = document.querySelector(selector), layers = [];
                for (let at = element; at; at = at.parentElement)
                    layers.unshift(rgb(getComputedStyle(at).backgroundColor));
                const back = layers.reduce((below, over) => {
                    const alpha = over[3] ?? 1;
                    return over.slice(0, 3).map((x, i) => alpha * x + (1 - alpha) * below[i]);
                }, [255, 255, 255]);
                const [a, b] = [light(rgb(getComputedStyle(element).color)), light(back)];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            }""",
            selector,
        )
    )


class TestSites:
    def test_a_click_shows_the_source_and_another_hides_it(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        source = page.locator("#detail-3 .source")
        assert source.count() == 0
        page.click("#site-3 .opener")
        assert source.is_visible()
        assert "k-NN attention for a CPU" in source.inner_text()
        assert page.locator("#detail-3 .diff .new").count() >= 2
        assert page.locator("#detail-4").is_hidden()
        page.click("#site-3 .opener")
        assert page.locator("#detail-3").is_hidden()

    def test_anywhere_in_the_row(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        page.click("#site-0 .badge")
        assert page.locator("#detail-0 .source").is_visible()

    def test_a_dense_site_says_why_and_has_no_source(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        page.click("#site-11 .opener")
        assert "topk is None for this site" in page.inner_text("#detail-11 .reason")
        assert page.locator("#detail-11 .source").count() == 0

    def test_by_keyboard_alone(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(12):
            if page.evaluate("document.activeElement.className") == "opener":
                break
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-controls')") == "detail-0"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert page.locator("#detail-1 .source").is_visible()
        assert page.get_attribute("#site-1 .opener", "aria-expanded") == "true"
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.getAttribute('aria-controls')") == "detail-11"
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"

    def test_the_source_and_the_graph_are_reached_with_tab(self, visit: Any, vit: Path) -> None:
        page = visit(vit, fragment="#site-0")
        classes = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            classes.add(
                page.evaluate("document.activeElement.className.split(' ')[0] || document.activeElement.tagName")
            )
        assert {"diff", "source", "opener", "SUMMARY", "BUTTON", "op"} <= classes

    def test_an_address_opens_its_site(self, visit: Any, vit: Path) -> None:
        page = visit(vit, fragment="#site-5")
        assert page.locator("#detail-5 .source").is_visible()

    def test_narrow_windows_scroll_the_table_only(self, visit: Any, vit: Path) -> None:
        page = visit(vit, fragment="#site-0", width=420)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 420


class TestGraph:
    def test_badges_lead_to_their_site(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        page.click(".graph a.badge.fused >> nth=0")
        assert page.locator("#detail-0 .source").is_visible()

    def test_edges_join_the_rows_that_show(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        shown = "document.querySelectorAll('.edges circle').length"
        page.click("button[data-all=close]")
        page.wait_for_timeout(100)
        closed = page.evaluate(shown)
        assert closed == page.evaluate("document.querySelectorAll('.graph > .op, .graph > details').length")
        page.click("button[data-all=open]")
        page.wait_for_timeout(200)
        assert page.evaluate(shown) == page.locator(".op").count() > 10 * closed
        first = page.evaluate(
            """() => {
                const dot = document.querySelector(".edges circle").getBoundingClientRect();
                const row = document.querySelector(".op").getBoundingClientRect();
                return Math.abs(dot.top + dot.height / 2 - row.top - row.height / 2);
            }"""
        )
        assert first < 1

    def test_a_row_lights_up_what_it_reads(self, visit: Any, vit: Path) -> None:
        page = visit(vit)
        page.click("button[data-all=open]")
        page.wait_for_timeout(200)
        row = page.locator(".op.fused").first  # the SDPA call: q, k and v in, one reader
        row.focus()
        assert page.locator(".op.near .own").all_inner_texts() == ["q", "k", "v"]
        assert page.locator(".edges path.on").count() == 4


class TestTheme:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_follows_the_system_and_can_be_read(self, visit: Any, vit: Path, scheme: str) -> None:
        page = visit(vit, scheme, "#site-1")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        page.click("#site-11 .opener")
        parts = [
            "body", ".lead", "a", ".badge.fused", ".badge.dense", ".badge.scores-kept", ".badge.refused",
            ".head .where", ".diff .new", ".diff .gone", ".op .shape", ".op.fused .shape",
            ".source .c, .source .cm", ".source .k", ".source .kt",
        ]  # fmt: skip
        contrasts = {part: round(ratio(page, part), 2) for part in parts}
        assert all(value >= 4.5 for value in contrasts.values()), contrasts


class Clock:
    """Seconds of work of a page's main thread: of the processor, so that a busy machine does not count."""

    def __init__(self, page: Any) -> None:
        self._session = page.context.new_cdp_session(page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self._page = page

    def seconds(self) -> float:
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    def of(self, script: str) -> float:
        before = self.seconds()
        self._page.evaluate(f"() => {{ {script}; document.body.offsetHeight; }}")
        return self.seconds() - before


class TestSpeed:
    def test_a_twelve_layer_vit_opens_in_under_a_second(self, visit: Any, vit: Path) -> None:
        page = visit(vit, blank=True)
        clock = Clock(page)
        page.goto(f"file://{vit}")
        assert 0 < clock.seconds() < 1

    def test_a_thousand_nodes_stay_usable(self, visit: Any, large: Path) -> None:
        page = visit(large, blank=True)
        clock = Clock(page)
        page.goto(f"file://{large}")
        assert 0 < clock.seconds() < 1
        assert clock.of("graphs[0].all('open'); graphs[0].draw()") < 0.5
        assert clock.of("graphs[0].light(document.querySelectorAll('.op')[500])") < 0.1
        page.wait_for_timeout(200)
        assert page.evaluate("document.querySelectorAll('.edges circle').length") == 1000
        page.click(".op.refused a.badge")
        assert page.locator("#refusal-0").is_visible()
