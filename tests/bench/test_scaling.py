"""The table and plots of how time and memory grow."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "scaling", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUDGET", 0.01)
    return module


def test_sides_and_limit(scaling) -> None:
    sides, left_out = scaling.discrimination_sides(8, math.inf)
    assert set(sides) == {"gankern", "cdist", "broadcast"}
    assert not left_out
    sides, left_out = scaling.discrimination_sides(64, 20e6)
    assert set(sides) == {"gankern", "cdist"}
    assert set(left_out) == {"broadcast"}


def test_report(scaling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def few(quick: bool, limit: float):
        for n in (4, 8):
            yield from scaling.measure("samples", n, scaling.discrimination_sides(n, math.inf)[0])
        yield scaling.Point("samples", 16, "gankern", 1.0, 1.0)
        yield scaling.Point("samples", 16, "broadcast", None, None, "about 9 GiB")
        yield from scaling.measure("width", 2, scaling.generator_sides(2, 1))

    monkeypatch.setattr(scaling, "run_all", few)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(tmp_path)])
    scaling.main()
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert len(points) == 2 * 3 + 2 + 3
    assert all(p["milliseconds"] > 0 for p in points if p["left_out"] is None)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "left out: about 9" in capsys.readouterr().out
