"""The report as a page: in Chromium on a laptop and on a phone, light and dark, and without a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import fakes
from browser import SCREENS, opened

from gankern.bench import page
from gankern.bench.compare import compare
from gankern.bench.results import Measured, Report

SIDES = "Time and memory of one call"


@pytest.fixture(scope="module")
def report() -> Report:
    made = fakes.report()
    made.comparison = compare(made, made, "old.json")
    return made


@pytest.fixture(scope="module")
def path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, and its JSON beside it."""
    path = tmp_path_factory.mktemp("page") / "bench.html"
    report.save(path.with_suffix(".json"))
    page.write(report, path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_every_screen(chromium, path, screen, scheme):
    with opened(chromium, path, screen, scheme) as shown:
        shown.check()


def test_the_browser_shows_the_numbers_of_the_json(chromium, path):
    report = Report.load(path.with_suffix(".json"))
    with opened(chromium, path, "laptop", "light") as shown:
        cells, drawn = shown.cells(), shown.drawn()
        assert report.command in shown.page.locator("pre").last.inner_text()
    for case in report.cases:
        row = {column: value for (caption, name, column), value in cells.items() if name == case.name}
        if case.ratio is None:
            assert "WRONG" in row.values()
            continue
        assert f"{case.ratio.median:.2f}x" in drawn and case.name in drawn
        found = [float(row[column]) for column in ("ratio", "p20", "p80", "error")]
        assert found == [case.ratio.median, case.ratio.p20, case.ratio.p80, case.error]
        for name, side in case.sides.items():
            _assert_side(cells, SIDES, f"{case.name}: {name}", side)
    (training,) = report.training
    caption = "Same weights, batches and random numbers on both sides"
    assert float(cells[caption, "dcgan", "ratio"]) == training.ratio.median
    assert float(cells[caption, "dcgan", "gankern images/s"]) == training.images_per_second("gankern")
    for verdict in report.comparison.verdicts[:2]:
        caption = "Noise-aware: ranges apart, and medians by more than 5%"
        assert cells[caption, verdict.name, "verdict"] == verdict.verdict
        assert float(cells[caption, verdict.name, "change"]) == verdict.change


def test_every_point_of_a_sweep_is_there(chromium, path):
    report = Report.load(path.with_suffix(".json"))
    (sweep,) = report.sweeps
    with opened(chromium, path, "phone", "dark") as shown:
        rows = shown.page.locator("table", has_text="fake.forward against batch").locator("tbody tr")
        values = rows.evaluate_all("all => all.map(r => [...r.children].map(c => c.dataset.value ?? c.textContent))")
        drawn = shown.drawn()
    want = [
        [str(point.size["batch"]), name, *map(str, _values(side))]
        for point in sweep.points
        for name, side in point.sides.items()
    ]
    assert [[r[0], r[1], *(str(float(v)) for v in r[2:])] for r in values] == [
        [w[0], w[1], *(str(float(v)) for v in w[2:])] for w in want
    ]
    assert {"1", "4", "16", "ms", "peak MiB", "batch"} <= set(drawn)


def _values(side: Measured) -> list[float]:
    return [side.seconds.median, side.seconds.p20, side.seconds.p80, side.peak_bytes]


def _assert_side(cells, caption: str, row: str, side: Measured) -> None:
    columns = ("median, ms", "p20, ms", "p80, ms")
    want = [side.seconds.median, side.seconds.p20, side.seconds.p80]
    assert [float(cells[caption, row, column]) for column in columns] == want
    assert cells[caption, row, "peak MiB"] == ("n/a" if side.peak_bytes is None else str(side.peak_bytes))


def test_the_page_of_an_interrupted_run(tmp_path):
    page.write(Report("gankern bench <x>", {}), tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text()
    assert "gankern bench &lt;x&gt;" in text and "<figure" not in text


def test_what_was_left_out_and_why(path):
    text = path.read_text()
    for part in ("no second derivative", "output: relative error", "WRONG", "critic, by gankern&#39;s layers"):
        assert part in text
