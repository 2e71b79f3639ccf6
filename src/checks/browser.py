"""Headless Chromium for the checks of the report, over the system's chromium."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

TEXT_SIZES = """() => {
  const small = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || !e.getClientRects().length || /^(SCRIPT|STYLE)$/.test(e.tagName)) continue;
    const svg = e.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const size = parseFloat(getComputedStyle(e).fontSize) * scale;
    if (size < 11.99) small.push(`${size.toFixed(1)} ${node.data.slice(0, 40)}`);
  }
  return small;
}"""
"""Pieces of visible text under 12 px."""

BLANK = """() => [...document.querySelectorAll("figure.panel")].filter((f) => {
  const svg = [...f.querySelectorAll("svg")].find((x) => x.getClientRects().length);
  const box = svg && svg.getBoundingClientRect();
  const wide = (p) => p.getBoundingClientRect().width > 1;
  const ink = svg ? [...svg.querySelectorAll("path, use, circle")].filter(wide) : [];
  return !svg || box.width < 100 || box.height < 50 || ink.length < 4;
}).map((f) => f.textContent.slice(0, 60))"""
"""Figures that show nothing."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; without one the check is skipped, with CI=true it fails."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        told = "no chromium on this machine: apt-get install chromium to check the report in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)
    rootless = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own sandbox does not start as root
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=[*rootless, "--disable-gpu"], timeout=180_000)
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, width: int = 1280, anchor: str = "") -> tuple[Page, list[str]]:
    """The page, its script run, offline; and what the console said in earnest, which grows while the page is used."""
    page, said = browser.new_page(viewport={"width": width, "height": 900}), []
    page.set_default_timeout(120_000)
    page.context.set_offline(True)
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: said.append(r.url) if r.url.startswith("http") else None)
    page.goto(f"file://{path}{anchor}")
    page.wait_for_function("document.body.dataset.ready === 'yes'")
    return page, said
