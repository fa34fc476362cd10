"""The page of a profile: in Chromium on a laptop and on a phone, light and dark."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENS, opened
from rich.console import Console

from gankern import html
from gankern._info import info
from gankern.bench.timing import Spread
from gankern.profile import page
from gankern.profile.meters import OTHER
from gankern.profile.report import detail_tables, headline, show
from gankern.profile.results import Advice, Phase, ProfileReport, StepProfile

CEILINGS = {
    "float32_flops": 3e11,
    "bfloat16_flops": 2e12,
    "copy_bytes": 2e10,
    "cached_copy_bytes": 1e11,
    "call_seconds": 2e-6,
}
PARTS = ("interpolation", "inner forward", "inner gradient", "tail", "double backward")
OUR_PARTS = ("interpolation", "inner forward", "inner gradient", "tail", "tangent", "weight gradient")


def _profile(scale: float, parts: tuple[str, ...]) -> StepProfile:
    names = ["data", "real forward", "fake forward", *(f"penalty/{part}" for part in parts), "backward", OTHER]
    phases = tuple(
        Phase(name, scale * (i + 1) * 1e-3, 10.0 * i, i * 10**8, (i + 1) * 10**7, 3 * i + 1, 10**6, None, 1e-4)
        for i, name in enumerate(names)
    )
    seconds = sum(phase.seconds for phase in phases)
    return StepProfile("cpu", "float32", 20, Spread(seconds, 0.9 * seconds, 1.1 * seconds), seconds, phases, 10**8)


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return ProfileReport(
        "my.critics:residual: critic step of wgan-gp, batch 64 of 3,64,64",
        "gankern profile --critic my.critics:residual --shape 3,64,64",
        {**info(), "ceilings": CEILINGS},
        {"stock": _profile(20.0, PARTS), "gankern": _profile(10.0, OUR_PARTS)},
        {"stock": 0.01, "gankern": 0.02},
        [Advice("The gradient penalty is 60% of the stock step", 0.03)],
    )


@pytest.fixture(scope="module")
def path(report: ProfileReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "profile.html"
    report.save_page(path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_every_screen(chromium: Any, path: Path, screen: str, scheme: str) -> None:
    with opened(chromium, path, screen, scheme) as shown:
        shown.check()


def test_the_browser_shows_the_numbers_of_the_profile(chromium: Any, report: ProfileReport, path: Path) -> None:
    with opened(chromium, path, "laptop", "light") as shown:
        cells, drawn = shown.cells(), shown.drawn()
        text = shown.page.locator("body").inner_text()
    for name, profile in report.sides.items():
        caption, work = headline(profile, report.overhead[name]), f"What the {name} step does in each phase"
        for phase in profile.phases:
            row = f"· {phase.part}" if phase.part else phase.name
            assert float(cells[caption, row, "ms"] or "nan") == pytest.approx(phase.seconds * 1e3, abs=5e-3)
            assert float(cells[caption, row, "calls"] or "nan") == phase.calls
            assert float(cells[caption, row, "Python, ms"] or "nan") == pytest.approx(0.1)
            assert float(cells[work, row, "MB"] or "nan") == pytest.approx(phase.bytes / 1e6)
        assert float(cells[caption, "step", "ms"] or "nan") == pytest.approx(profile.mean_seconds * 1e3, abs=5e-3)
    assert report.command in text and report.subject in text and report.advice[0].text in text
    assert {"stock", "gankern", "double backward", "tangent", "GFLOP/s"} <= set(drawn)


def test_no_table_is_cut_off_on_a_laptop(chromium: Any, path: Path) -> None:
    with opened(chromium, path, "laptop", "light") as shown:
        widths = shown.page.evaluate(
            "() => [...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])"
        )
    assert len(widths) == 5 and all(needed <= there for needed, there in widths)


def test_each_phase_has_a_colour_of_its_own_in_the_order_of_the_table(report: ProfileReport) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    page._timeline(axes, html.LIGHT, report)
    handles, labels = axes.get_legend_handles_labels()
    stock_parts, our_parts = list(PARTS), [part for part in OUR_PARTS if part not in PARTS]
    expected = ["data", "real forward", "fake forward", *stock_parts, "backward", OTHER, *our_parts]
    assert labels == expected
    colors = [bar.patches[0].get_facecolor() for bar in handles]
    assert len(set(colors)) == len(expected)
    # Both sides' bars follow each other without a gap, and the same phase has one colour.
    rows = page._places(report)
    for row, profile in enumerate(report.sides.values()):
        bars = sorted((b for b in axes.patches if round(b.get_y() + 0.4) == row), key=lambda bar: bar.get_x())
        assert len(bars) == len(profile.phases)
        wanted = sorted(profile.phases, key=lambda phase: rows[phase.name])
        assert [bar.get_width() for bar in bars] == pytest.approx([phase.seconds * 1e3 for phase in wanted])
        by_label = dict(zip(labels, colors, strict=True))
        assert [bar.get_facecolor() for bar in bars] == [by_label[phase.part or phase.name] for phase in wanted]


def test_the_roofline_names_the_phases_of_both_sides(report: ProfileReport) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    page._roofline(axes, html.LIGHT, report)
    handles, labels = axes.get_legend_handles_labels()
    assert {"double backward", "tangent", "weight gradient"} <= set(labels) and len(labels) == len(set(labels))
    assert len({handle.get_color() for handle in handles}) == len(labels)


def test_what_one_side_alone_shows(report: ProfileReport, tmp_path: Path) -> None:
    alone = dataclasses.replace(report, sides={"loop": report.sides["stock"]}, overhead={})
    alone.save_page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Filled:" not in text and "The loop step by phase" in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_terminal_tables_fit_and_cut_no_number_off(report: ProfileReport, width: int) -> None:
    out = io.StringIO()
    show(report, Console(file=out, width=width))
    text = out.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for profile in report.sides.values():
        for _, rows in detail_tables(profile, report.ceilings):
            for row in rows:
                numbers = " ".join(row[1:]).split()
                assert any(line.startswith(row[0]) and line.split()[-len(numbers) :] == numbers for line in lines), row
