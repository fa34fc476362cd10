"""Reports in a real browser: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCREENS = {"laptop": (1280, 800), "phone": (375, 812)}
_ARGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update", "disable-sync")

# Every element with text of its own that is shown: how far its colour is from what is behind it, and its size in
# pixels. Text of a drawing is scaled with it.
_TEXTS = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const luminance = c => {
    const [r, g, b] = parse(c).slice(0, 3).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor, parts = parse(c);
      if (parts.length === 3 || parts[3] === 1) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.body.querySelectorAll("*")]
    .filter(e => own(e) && e.getClientRects().length)
    .map(e => {
      const style = getComputedStyle(e), drawn = e instanceof SVGElement;
      const a = luminance(drawn ? style.fill : style.color), b = luminance(behind(e));
      const matrix = drawn ? e.getScreenCTM() : { a: 1, b: 0 };
      return {
        text: e.textContent.trim(), drawn,
        contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
        pixels: parseFloat(style.fontSize) * Math.hypot(matrix.a, matrix.b),
      };
    });
}"""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; tests that ask for it are skipped where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium: make browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=[f"--{arg}" for arg in _ARGS])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page on a screen, and every address that it asked for."""

    page: Any
    screen: str
    scheme: str
    requests: list[str] = field(default_factory=list)

    def cells(self) -> dict[tuple[str, str, str], str | None]:
        """Cells by caption, row and column: their numbers, or their text where there is none."""
        script = """() => [...document.querySelectorAll("table")].flatMap(table =>
          [...table.querySelectorAll("[data-column]")].map(cell => [
            table.caption ? table.caption.textContent : "", cell.parentElement.dataset.row, cell.dataset.column,
            cell.dataset.value ?? cell.textContent]))"""
        return {(caption, row, column): value for caption, row, column, value in self.page.evaluate(script)}

    def drawn(self) -> list[str]:
        """The text of the drawings that are shown."""
        return [text["text"] for text in self.page.evaluate(_TEXTS) if text["drawn"]]

    def check(self) -> None:
        """Assert what holds for every report: it fits, can be read, asks for nothing, and shows the right drawings."""
        width = SCREENS[self.screen][0]
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width
        assert [r for r in self.requests if not r.startswith(("file:", "data:"))] == []
        assert len(self.requests) == 1
        texts = self.page.evaluate(_TEXTS)
        assert not [t for t in texts if t["contrast"] < 4.5]
        assert not [t for t in texts if t["pixels"] < 9.5]
        drawings = self.page.locator(".drawing:visible")
        kind = f"{self.scheme} {'wide' if self.screen == 'laptop' else 'narrow'}"
        assert set(drawings.evaluate_all("all => all.map(e => e.className)")) <= {f"drawing {kind}"}
        assert drawings.count() == self.page.locator("figure").count()
        for box in drawings.evaluate_all("all => all.map(e => e.getBoundingClientRect().toJSON())"):
            assert box["width"] > 0.7 * width and box["right"] <= width


@contextmanager
def opened(browser: Any, path: Path, screen: str, scheme: str) -> Iterator[Opened]:
    """Open a file as a person would."""
    width, height = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    found = Opened(page, screen, scheme)
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.resolve().as_uri())
    yield found
    context.close()
