"""The page of a profile: in Chromium on a laptop and on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import SCREENS, opened

from gankern._info import info
from gankern.bench.timing import Spread
from gankern.profile.meters import OTHER
from gankern.profile.report import headline
from gankern.profile.results import Advice, Phase, ProfileReport, StepProfile

CEILINGS = {
    "float32_flops": 3e11,
    "bfloat16_flops": 2e12,
    "copy_bytes": 2e10,
    "cached_copy_bytes": 1e11,
    "call_seconds": 2e-6,
}
PARTS = ("interpolation", "inner forward", "inner gradient", "tail", "double backward")


def _profile(scale: float) -> StepProfile:
    names = ["data", "real forward", "fake forward", *(f"penalty/{part}" for part in PARTS), "backward", OTHER]
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
        {"stock": _profile(2.0), "gankern": _profile(1.0)},
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
        caption = headline(profile, report.overhead[name])
        for phase in profile.phases:
            row = f"· {phase.part}" if phase.part else phase.name
            assert float(cells[caption, row, "ms"] or "nan") == pytest.approx(phase.seconds * 1e3, abs=5e-3)
            assert float(cells[caption, row, "calls"] or "nan") == phase.calls
            assert float(cells[caption, row, "Python, ms"] or "nan") == pytest.approx(0.1)
        assert float(cells[caption, "step", "ms"] or "nan") == pytest.approx(profile.mean_seconds * 1e3, abs=5e-3)
    assert report.command in text and report.subject in text and report.advice[0].text in text
    assert {"stock", "gankern", "penalty", "GFLOP/s"} <= set(drawn)
