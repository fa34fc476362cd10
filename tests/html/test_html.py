"""Pages, tables and figures, without a browser."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.axes import Axes

from gankern import html
from gankern.html.figures import WIDTHS

NASTY = "<script>alert('&\"')</script>"


class Elements(HTMLParser):
    """Start tags with their attributes, and whether every one is closed."""

    VOID = ("meta", "link", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def draw(axes: Axes, palette: html.Palette) -> None:
    axes.plot([1, 2], [1, 2], color=palette.accent, marker="o", label=f"line {NASTY}")
    axes.set_xlabel("samples")


def test_a_page_is_whole_escaped_and_asks_for_nothing(tmp_path):
    sections = [
        html.Section(NASTY, [html.paragraph(NASTY), html.code(NASTY)]),
        html.Section("table", [html.table([NASTY, "b"], [[NASTY, html.Cell(NASTY, 1.5)]], caption=NASTY)]),
        html.Section("figure", [html.figure(draw, label=NASTY, caption=NASTY)]),
    ]
    path = tmp_path / "new" / "page.html"
    html.write_page(path, NASTY, sections, lead=NASTY)
    text = path.read_text(encoding="utf-8")
    elements = Elements(text)
    assert "script" not in {tag for tag, _ in elements.found}
    links = [a.get(n) for _, a in elements.found for n in ("src", "href", "xlink:href") if a.get(n)]
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text


def test_ids_are_unique_and_what_refers_to_them_finds_them():
    text = html.render_page("t", [html.Section("f", [html.figure(draw, label="a"), html.figure(draw, label="b")])])
    ids = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_a_figure_is_drawn_for_every_screen_and_keeps_its_text():
    calls = []

    def noted(axes: Axes, palette: html.Palette) -> None:
        calls.append(palette.name)
        draw(axes, palette)

    text = html.figure(noted, label="a line")
    assert calls == ["light"] * len(WIDTHS) + ["dark"] * len(WIDTHS)
    assert text.count(">samples</text>") == len(calls)
    assert text.count(html.LIGHT.accent) and text.count(html.DARK.accent)


def test_a_table_keeps_numbers_in_full():
    text = html.table(["case", "ms"], [["a", html.Cell("1.23", 1.23456789, "worse")], ["b", "n/a"]])
    cells = [a for tag, a in Elements(text).found if tag == "td"]
    assert [(c["data-column"], c.get("data-value"), c["class"].split()) for c in cells] == [
        ("ms", "1.23456789", ["number", "worse"]),
        ("ms", None, ["number"]),
    ]


def test_a_row_must_fit_the_columns():
    with pytest.raises(ValueError, match="rows: expected 2 cells each, got 1"):
        html.table(["a", "b"], [["a"]])


def _contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _oklab(color: str) -> tuple[float, ...]:
    """Where distances are as large as they look (Ottosson 2020)."""
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    cones = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.63))
    long, middle, short = ((x * r + y * g + z * b) ** (1 / 3) for x, y, z in cones)
    axes = ((0.2105, 0.7936, -0.0041), (1.978, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))
    return tuple(x * long + y * middle + z * short for x, y, z in axes)


@pytest.mark.parametrize("palette", [html.LIGHT, html.DARK], ids=lambda p: p.name)
def test_series_are_told_apart(palette):
    # As many as a step of WGAN-GP has phases, stock's and gankern's together.
    assert len(palette.series) == 14
    pairs = itertools.combinations(map(_oklab, palette.series), 2)
    assert min(math.dist(*pair) for pair in pairs) > 0.08


@pytest.mark.parametrize("palette", [html.LIGHT, html.DARK], ids=lambda p: p.name)
def test_colours_stand_out(palette):
    for color in (palette.text, palette.muted, palette.accent, palette.better, palette.worse):
        assert _contrast(color, palette.surface) >= 4.5 and _contrast(color, palette.page) >= 4.5
    assert all(_contrast(color, palette.surface) >= 3 for color in palette.series)
